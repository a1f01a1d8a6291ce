"""Texts that the processes of a job exchange without a device: through JAX's coordination service, with a deadline.

A collective waits forever for a process that failed before it. This exchange ends with an error, and signals are handled while
it waits.
"""

from __future__ import annotations

import itertools
import time

import jax
from jax._src import distributed  # its key-value store has no public name

DEADLINE_SECONDS = 600.0
"""Seconds to wait for the texts of the other processes, which may still be reading their share of a checkpoint."""
_POLL_SECONDS = 1.0
"""Seconds of one wait; Python handles signals between two of them."""
_exchanges = itertools.count()


def exchange(text: str, purpose: str, deadline_seconds: float = DEADLINE_SECONDS) -> list[str]:
    """Send a text to all processes of the job; all of them must call this equally often and in the same order.

    Args:
        text: The text of this process.
        purpose: What the processes agree on, for the message of an error.
        deadline_seconds: Seconds to wait for the others.

    Returns:
        The texts of all processes, by index.

    Raises:
        ConnectionError: If a process does not send its text in time; the same command may succeed later.
    """
    client = distributed.global_state.client
    count = jax.process_count()
    if client is None or count == 1:
        return [text]
    # Keys of the store are written once, so each exchange has a name of its own; all processes count alike.
    prefix = f"moe_train/exchange/{next(_exchanges)}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", text)
    deadline = time.monotonic() + deadline_seconds
    texts = []
    for index in range(count):
        while True:
            try:
                texts.append(client.blocking_key_value_get(f"{prefix}/{index}", int(1000 * _POLL_SECONDS)))
                break
            except jax.errors.JaxRuntimeError as error:
                # JAX has one type for all errors of the service, so the status has to be read from the text.
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"process {index} of {count} did not answer within {deadline_seconds:g} s ({purpose}); start the job again"
                    ) from error
    return texts
