"""What the cases need of torch: importing torchvision without its compiled operators, recording what modules give."""

from collections.abc import Mapping
from typing import Any

import torch

_OPERATORS = torch.library.Library('torchvision', 'FRAGMENT')
for _operator in ('nms', 'qnms'):  # what a torchvision without its compiled operators asks for
    if not hasattr(torch.ops.torchvision, _operator):
        _OPERATORS.define(f'{_operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor')


def recorded(reference: Any, modules: Mapping[str, str], *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
    """Calls a network; returns `{endpoint: output of that submodule}` for `{endpoint: its dotted name}`, and the result."""
    seen: dict[str, Any] = {}

    def keep(endpoint):
        def hook(module, inputs, output):
            seen[endpoint] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [reference.get_submodule(name).register_forward_hook(keep(e)) for e, name in modules.items()]
    try:
        result = reference(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {endpoint: seen[endpoint] for endpoint in modules}, result


def with_logits(reference: Any, image: Any, modules: Mapping[str, str]) -> dict[str, Any]:
    """`recorded` of an image network, its result as `logits`."""
    endpoints, logits = recorded(reference, modules, image)
    return {**endpoints, 'logits': logits}
