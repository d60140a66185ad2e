"""Name maps, one file a family of networks: every origin of its weights, how their names are ours."""

import re
from collections.abc import Iterable

from flax import linen as nn

from tl_jax.errors import UserError, nearest
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps import (
    bert,
    bit,
    clip,
    convnext,
    deberta,
    densenet,
    efficientnet,
    gpt2,
    inception,
    llama,
    mobilenet,
    resnet,
    squeezenet,
    swin,
    t5,
    tiny,
    vgg,
    vit,
)
from tl_jax.pretrained.names import SAME, Family, NameMap, Origin, Rule
from tl_jax.pretrained.tensors import listed

# One module a line: FAMILIES and, of well-known checkpoints, CATALOGUE.
MODULES = (
    bert,
    bit,
    clip,
    convnext,
    deberta,
    densenet,
    efficientnet,
    gpt2,
    inception,
    llama,
    mobilenet,
    resnet,
    squeezenet,
    swin,
    t5,
    tiny,
    vgg,
    vit,
)
FAMILIES: tuple[Family, ...] = tuple(family for module in MODULES for family in module.FAMILIES)
CATALOGUE: dict[str, Entry] = {name: entry for module in MODULES for name, entry in module.CATALOGUE.items()}
# Our own format names tensors by our paths, whatever the family.
OURS = Origin('tl_jax', r'params/.+', lambda backbone: [Rule('{path*}', '{path*}', SAME)])


def family_of(backbone: nn.Module) -> Family | None:
    """The family of a backbone; None for networks that only our own format knows."""
    return next((family for family in FAMILIES if type(backbone) is family.module), None)


def choose(names: Iterable[str], source: str, backbone: nn.Module | None = None) -> NameMap:
    """Returns the name map of the origin whose mark is among the names, of the backbone's family if it is given.

    Args:
      names: of a file, without a prefix that all share.
      source: what to call the file.
      backbone: the network to fill.

    Raises:
      UserError: the family has no such origin; says which family the file looks like.
    """
    names = list(names)
    if _marked(OURS, names):
        return _name_map(OURS, backbone, family_of(backbone))
    families = [family for family in FAMILIES if backbone is None or type(backbone) is family.module]
    for family in families:
        for origin in family.origins:
            if _marked(origin, names):
                return _name_map(origin, backbone, family)
    looks = [f'{f.module.__name__} ({o.name})' for f in FAMILIES for o in f.origins if _marked(o, names)]
    known = (
        ', '.join(o.name for f in families for o in f.origins)
        if backbone
        else ', '.join(f.module.__name__ for f in FAMILIES)
    )
    looks_like = f'it looks like {" or ".join(dict.fromkeys(looks))}' if looks else f'known are {known or "none"}'
    raise UserError(
        f'{source}: no name map{_of(backbone)} knows its tensors ({listed(names)}); {looks_like}; choose that model, or '
        'save the weights in our own format with save_variables'
    )


def name_map(origin: str, backbone: nn.Module) -> NameMap:
    """Returns the name map of an origin by its name, 'tl_jax' among them, to export to.

    Raises:
      UserError: the backbone's family has no such origin.
    """
    family = family_of(backbone)
    origins = {each.name: each for each in (*(family.origins if family else ()), OURS)}
    if origin not in origins:
        raise UserError(f'origin: there is no {origin!r} of a {type(backbone).__name__}; {nearest(origin, origins)}')
    if why := origins[origin].refuses(backbone):
        raise UserError(f"origin: {origin!r} has no such {type(backbone).__name__}: {why}; export to 'tl_jax'")
    return _name_map(origins[origin], backbone, family)


def name_maps(backbone: nn.Module, *, in_memory: bool = False) -> list[NameMap]:
    """The name map of every origin of the backbone's family, transformers first: for what addresses modules by name.

    Args:
      backbone: the network.
      in_memory: without the names that only files have, so that what is written are the modules' own.
    """
    family = family_of(backbone)
    origins = sorted(family.origins if family else (), key=lambda origin: origin.name != 'transformers')
    found = []
    for origin in origins:
        read = _name_map(origin, backbone, family)
        own = tuple(r for r in read.rules if not (origin.files_only and re.fullmatch(origin.files_only, r.theirs)))
        found.append(read._replace(rules=own) if in_memory else read)
    return found


def _name_map(origin: Origin, backbone: nn.Module | None, family: Family | None) -> NameMap:
    fits = tuple(family.fits(backbone)) if family else ()
    other_features = origin.refuses_head(backbone) if backbone is not None else ''
    return NameMap(origin.name, tuple(origin.rules(backbone)), origin.ignored, origin.prefix, fits, other_features)


def _marked(origin: Origin, names: Iterable[str]) -> bool:
    return any(re.fullmatch(origin.mark, name.removeprefix(origin.prefix)) for name in names)


def _of(backbone: nn.Module | None) -> str:
    return f' of a {type(backbone).__name__}' if backbone is not None else ''
