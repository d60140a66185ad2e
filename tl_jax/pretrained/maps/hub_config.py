"""What the families read alike in a `config.json` of Hugging Face or timm, and say alike of what an origin is without."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from tl_jax.errors import UserError, nearest
from tl_jax.pretrained.catalogue import Entry

# Names of transformers -> ours.
ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
    'tanh': 'tanh',
}


def activation(config: Mapping[str, Any], key: str, default: str = 'gelu') -> str:
    """Our name of the activation that a config states.

    Raises:
      UserError: we have no such activation.
    """
    theirs = config.get(key, default)
    if theirs not in ACTIVATIONS:
        raise UserError(f'config.json: {key} {theirs!r:.80} is unknown; {nearest(str(theirs), ACTIVATIONS)}')
    return ACTIVATIONS[theirs]


def require(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a config that asks for anything but the wanted values, absent ones being right.

    Raises:
      UserError: names the first such key.
    """
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise UserError(
                f'config.json: {key} = {config[key]!r:.80} is not supported for {config["model_type"]}; only {value!r} is'
            )


def only(backbone: nn.Module, **allowed: Sequence[Any]) -> str:
    """Why an origin refuses a backbone: the first field with another value than it has; '' if there is none."""
    for name, values in allowed.items():
        if (value := getattr(backbone, name)) not in values:
            return f'it has model.{name}={" or ".join(map(repr, values))} alone, and this is {value!r}'
    return ''


def timm_architectures(
    models: Mapping[str, Callable[..., Any]], catalogue: Mapping[str, Entry]
) -> dict[str, dict[str, Any]]:
    """`{architecture of timm: fields}` of a family: what it calls as timm does, and what its checkpoints are called there.

    Args:
      models: the family's, partials of its class.
      catalogue: with names such as 'timm/resnet18.a1_in1k'.
    """
    known = {name: dict(getattr(model, 'keywords', {})) for name, model in models.items()}
    for name, entry in catalogue.items():
        if name.startswith('timm/'):
            known[name.removeprefix('timm/').split('.')[0]] = known[entry.model] | dict(entry.fields)
    return known


def timm_fields(
    config: Mapping[str, Any], known: Mapping[str, dict[str, Any]], pool: str = 'avg'
) -> dict[str, Any] | None:
    """The fields for the architecture that timm's config states; None where it is none of the known ones.

    Args:
      config: the file.
      known: `{architecture: fields}`.
      pool: what they all have as `global_pool`.

    Raises:
      UserError: the network was made with other arguments than its architecture has.
    """
    name = config.get('architecture')
    if not isinstance(name, str) or name not in known:
        return None
    if config.get('model_args'):
        raise UserError(
            f'config.json: model_args = {config["model_args"]!r:.80} change {name}; give model.source the file alone, out '
            'of its folder, and their like as fields of model'
        )
    if (stated := config.get('global_pool') or pool) != pool:
        raise UserError(f'config.json: global_pool = {stated!r:.80} is not supported for {name}; only {pool!r} is')
    return dict(known[name])
