"""What a device exchanges in the tests that count bytes by hand."""

from __future__ import annotations

from moe_train.model.moe.transport.transport import ExchangeSizes

SIZES = ExchangeSizes(tokens=4096, model_dim=1024, experts_per_token=2, devices=8)
