#!/bin/sh
# A process that takes nothing from its stdin, as a tracker whose server does not answer.
exec sleep 60
