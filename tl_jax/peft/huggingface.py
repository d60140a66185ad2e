"""Adapter folders of Hugging Face's `peft`: `adapter_config.json` and `adapter_model.safetensors`, read and written.

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight  [rank, in]
    adapters/default/backbone/block1/attention/query/lora_a                   [in, rank]

Modules are found by the name maps of pretrained weights, and written as transformers calls them in memory since version 5.
A module that holds several of ours side by side (GPT-2's `c_attn`) is read into each of them; those are written as one
adapter of their joint rank, which computes the same. The metadata of a folder of ours say the sha256 of its base's weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from tl_jax.errors import UserError, nearest
from tl_jax.peft import huggingface_layers, huggingface_prompts
from tl_jax.peft.base import ROLE
from tl_jax.peft.huggingface_layers import Method, Part, Place
from tl_jax.peft.huggingface_prompts import PROMPT
from tl_jax.pretrained import maps, names, read, root_of, strict_json
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.pretrained.names import NameMap
from tl_jax.pretrained.safetensors_file import save_tensors
from tl_jax.pretrained.tensors import Tensor, listed
from tl_jax.trees import flatten
from tl_jax.workdir import write_atomically

CONFIG = 'adapter_config.json'
WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')
MAX_CONFIG_BYTES = 1_000_000
WHOLE = 'base_model.model.'
BASE = '.base_layer.'
BASE_SHA256 = 'base_sha256'
# `peft_type` -> how it is read and written.
METHODS: dict[str, Method] = huggingface_layers.METHODS | huggingface_prompts.METHODS


class Imported(NamedTuple):
    """A folder in our terms.

    Attributes:
      adapters: `{adapter: section of config.model.peft}`; several where ranks or scales differ between modules.
      leaves: `{path: array}`, collection included: the adapters', and whatever of the network was trained with them.
    """

    adapters: dict[str, dict[str, Any]]
    leaves: dict[str, np.ndarray]


def load_peft(source: str, backbone: nn.Module, *, name: str = 'default') -> Imported:
    """Reads an adapter folder.

    Args:
      source: a folder, or `hf://org/repo[@revision]`.
      backbone: of the network that the adapter is for.
      name: what to call the adapter.

    Raises:
      UserError: a file is missing or damaged, the method is none of `METHODS`, the configuration asks for what we would
        not compute, or a tensor has no place in the network. Shapes are checked where the leaves are laid over it.
    """
    folder = fetched(source)
    config = _config(folder)
    kind = config.get('peft_type')
    if not isinstance(kind, str) or kind not in METHODS:
        raise UserError(f'{folder}: its peft_type {kind!r:.80} is not known here; {nearest(str(kind), METHODS)}')
    _refuse_settings(config, METHODS[kind].settings, folder)
    tensors = read(_weights(folder)).tensors
    parts, plain = _parts(tensors)
    name_map = _map_of(backbone, [*parts, *plain], folder)
    places = {module: place_of(name_map, module, folder) for module in parts if module != PROMPT}
    adapters, leaves = METHODS[kind].read(config, parts, places, backbone, folder)
    flat = {
        f'params/{ROLE}/{name}{suffix}/{site}/{leaf}'.replace('//', '/'): array
        for suffix, by_site in leaves.items()
        for site, own in by_site.items()
        for leaf, array in own.items()
    }
    sections = {name + suffix: section for suffix, section in adapters.items()}
    return Imported(sections, flat | _plain_leaves(plain, name_map, folder))


def check_base(source: str, below: str) -> None:
    """Refuses a folder that says of which base it is, where the weights `below` are, or are completed by, another one."""
    path = _weights(fetched(source))
    wanted = read(path).metadata.get(BASE_SHA256)
    if wanted is None:
        return
    base, _ = root_of(below, (), ())
    if base.sha256 != wanted:
        raise UserError(
            f'{path}: an adapter of another base: it belongs to one of sha256 {wanted[:12]!r}, and {base.source} has '
            f'{base.sha256[:12]!r}; name the former as config.model.source'
        )


def save_peft(
    folder: Path,
    adapters: Mapping[str, Mapping[str, Any]],
    variables: Mapping[str, Any],
    trained: Sequence[str],
    backbone: nn.Module,
    *,
    base: str = '',
    sha256: str = '',
) -> list[str]:
    """Writes a network's adapters so that `PeftModel.from_pretrained` loads them.

    Args:
      folder: is made.
      adapters: `{adapter: section}`, all of one method; they become one.
      variables: of the adapted network, whole.
      trained: paths of the network's own leaves that are not the base's; their modules are saved whole.
      backbone: the network's.
      base: name or path of the base model, for `base_model_name_or_path`.
      sha256: of its weights, for `check_base`.

    Returns:
      The names of the tensors.

    Raises:
      UserError: `peft` has no such method or no such combination, or transformers no name for a module.
    """
    kinds = {_kind_of(section) for section in adapters.values()}
    if len(kinds) > 1:
        raise UserError(f'--origin=peft: the adapters {", ".join(adapters)} are of several methods; export one alone')
    (kind,) = kinds
    flat = flatten(variables)
    name_map = next(iter(maps.name_maps(backbone, in_memory=True)), None)
    if name_map is None:
        raise UserError(f'--origin=peft: no library has names for the modules of a {type(backbone).__name__}')
    parts = [Part(section, _sites(flat, name)) for name, section in adapters.items()]
    config, tensors = METHODS[kind].write(parts, lambda site: place_at(name_map, site), flat, backbone)
    targets = config.get('target_modules')
    if targets is None:
        trained = _with_head(trained, flat, name_map, kind)
    plain = _trained(trained, flat, name_map, targets or ())
    modules = sorted({tensor.rpartition('.')[0] for tensor in plain if BASE not in tensor})
    if any(BASE in tensor for tensor in plain) and kind != 'LORA':
        raise UserError(f'--origin=peft: a folder of {kind} has no place for the biases of the modules it adapts')
    common = {'peft_type': kind, 'task_type': None, 'base_model_name_or_path': base, 'inference_mode': True}
    if targets:
        common['modules_to_save'] = modules or None
    if kind == 'LORA':
        common['bias'] = 'lora_only' if any(BASE in tensor for tensor in plain) else 'none'
    folder.mkdir(parents=True, exist_ok=True)
    # Away first and back last, so that a kill between leaves no folder that would load, rather than a wrong pair.
    (folder / CONFIG).unlink(missing_ok=True)
    # A network with a prompt is peft's own, whose names have no further `model.`; the prompt has none at all.
    prefix = WHOLE if targets else 'base_model.'
    stored = {tensor if tensor == PROMPT else prefix + tensor: array for tensor, array in (tensors | plain).items()}
    of_base = {BASE_SHA256: sha256} if sha256 else {}
    save_tensors(folder / WEIGHTS[0], stored, {'format': 'pt', **of_base})
    write_atomically(folder / CONFIG, json.dumps(common | config, indent=2, sort_keys=True) + '\n')
    return list(stored)


def fetched(source: str) -> Path:
    """The local folder that a source names, fetched from the hub into its cache if need be."""
    if not source.startswith('hf://'):
        folder = Path(source).expanduser()
        if not (folder / CONFIG).is_file():
            raise UserError(f"{source}: is no adapter folder of Hugging Face's peft: it has no {CONFIG}")
        return folder
    # Imported here: only this kind of source needs it, and it takes half a second.
    from tl_jax.pretrained import hub

    match = hub.SOURCE.fullmatch(source)
    if not match or match['file']:
        raise UserError(f"source '{source}': write hf://org/repo or hf://org/repo@revision for an adapter")
    weights = hub.fetch(source, WEIGHTS)
    # Of the same commit: the revision may have moved on.
    return hub.fetch(f'hf://{match["repo"]}@{weights.parent.name}/{CONFIG}', ()).parent


def place_of(name_map: NameMap, module: str, folder: Path) -> Place:
    """Where a module of theirs is in our network."""
    target = names.target(name_map, f'{module}.weight')
    if target is None or not target.paths:
        raise UserError(f'{folder}: its module {module!r:.120} is none of this network; is it the right model?')
    return Place(module, _modules(target), _inputs_first(target))


def place_at(name_map: NameMap, site: str) -> Place:
    """Which module of theirs a module of ours is, or is part of."""
    found = next(
        filter(None, (names.foreign(name_map, f'params/{site}/{leaf}') for leaf in ('kernel', 'embedding'))), 0
    )
    if not found:
        raise UserError(f"--origin=peft: {name_map.origin} has no module for '{site}'")
    return Place(found[0].removesuffix('.weight'), _modules(found[1]), _inputs_first(found[1]))


def _modules(target: names.Target) -> tuple[str, ...]:
    """The modules of ours whose leaves a target names."""
    return tuple(path.removeprefix('params/').rpartition('/')[0] for path in target.paths)


def _inputs_first(target: names.Target) -> bool:
    """Whether the kernel lies there as [in, out]: a `Conv1D` of GPT-2."""
    try:
        seen = target.layout.write(*(np.zeros((1, 2)) for _ in target.paths)).shape
    except ValueError:  # A layout of convolutions.
        return False
    return seen == (1, 2 * len(target.paths))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f'{path.stat().st_size:,} bytes')
        config = strict_json.parse(path.read_bytes())
        if type(config) is not dict:
            raise ValueError('no table')
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: a damaged description of an adapter ({error!s:.200}); fetch it again') from None
    return config


def _refuse_settings(config: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Refuses what is set and would change the adapter in ways that nothing here computes."""
    for field, value in config.items():
        accepted = settings.get(field, ())
        if accepted is not ... and value not in (None, False, '', *accepted) and value not in ([], {}):
            raise UserError(
                f'{folder / CONFIG}: {field!r:.80} is {value!r:.80}, which is not known here and could change what the '
                'adapter computes; merge the adapter with peft, and load the merged weights'
            )


def _weights(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f'{folder}: an adapter folder without its {WEIGHTS[0]}; fetch it again')
    return found


# What a site's tensors are called behind the module's name.
_SUFFIXES = {
    f'.{part}{end}': part
    for part in ('lora_A', 'lora_B', 'lora_embedding_A', 'lora_embedding_B', 'lora_magnitude_vector', 'ia3_l')
    for end in ('', '.weight')
}


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Tensor]]:
    """Sorts a file's tensors: `{module: {part: array}}` of the adapter's own, and the rest, under the network's names."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    plain = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(WHOLE).removeprefix('base_model.')  # the latter of a prompt's network
        suffix = next((end for end in _SUFFIXES if short.endswith(end)), None)
        if short == PROMPT:
            parts.setdefault(PROMPT, {})[PROMPT] = tensor.array()
        elif '.original_module.' in short:
            continue  # what stands beside a module that was trained, before it was
        elif suffix:
            parts.setdefault(short.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor.array()
        else:
            plain[short.replace('.modules_to_save.', '.').replace(BASE, '.')] = tensor
    return parts, plain


def _map_of(backbone: nn.Module, modules: Sequence[str], folder: Path) -> NameMap:
    """The origin whose names these are: the one that knows most of them, transformers in doubt."""
    known = maps.name_maps(backbone)
    if not known:
        raise UserError(f'{folder}: no library of ours to read from names the modules of a {type(backbone).__name__}')

    def count(name_map):
        return sum(any(names.target(name_map, each) for each in (name, f'{name}.weight')) for name in modules)

    return max(known, key=count)


def _plain_leaves(plain: Mapping[str, Tensor], name_map: NameMap, folder: Path) -> dict[str, np.ndarray]:
    """What was trained of the network itself (`modules_to_save`, biases), as our leaves."""
    leaves = {}
    for name, tensor in plain.items():
        target = names.target(name_map, name)
        if target is None or not target.paths:
            raise UserError(
                f'{folder}: its tensor {name!r:.120} is of no module of this network; is it the right model?'
            )
        try:
            values = target.layout.read(tensor.array())
        except (ValueError, IndexError):
            raise UserError(
                f'{folder}: its tensor {name!r:.120} has the shape {tensor.shape}; is it the right model?'
            ) from None
        leaves |= dict(zip(target.paths, values if len(target.paths) > 1 else (values,), strict=True))
    return leaves


def _trained(
    trained: Sequence[str], flat: Mapping[str, Any], name_map: NameMap, targets: Sequence[str]
) -> dict[str, np.ndarray]:
    """The tensors of the network itself that go with its adapters: whole modules, and the biases of those adapted."""
    found = _names_there(flat, name_map)
    homeless = [path for path in trained if not found[path]]
    if homeless:
        raise UserError(f'--origin=peft: {name_map.origin} has no place for {listed(homeless)}, which learned as well')
    learned = {found[path][0] for path in trained}
    modules = {tensor.rpartition('.')[0] for tensor in learned}
    tensors = {}
    chosen = {path: flat[path] for path, there in found.items() if there and there[0].rpartition('.')[0] in modules}
    for name, tensor in foreign_tensors(chosen, name_map).items():
        module, _, leaf = name.rpartition('.')
        if module not in targets:
            tensors[name] = tensor
        elif name in learned and leaf != 'bias':
            raise UserError(
                f'--origin=peft: {name!r} learned beside its adapter; --merge, and export the whole network'
            )
        elif name in learned:
            tensors[f'{module}{BASE}{leaf}'] = tensor
    return tensors


def _with_head(trained: Sequence[str], flat: Mapping[str, Any], name_map: NameMap, kind: str) -> list[str]:
    """The leaves of the head, all of which go with a prompt, where nothing but them learned beside it."""
    named = _names_there(flat, name_map).items()
    head = [path for path, there in named if there and there[0].startswith(('classifier.', 'score.'))]
    if others := set(trained) - set(head):
        raise UserError(f'--origin=peft: beside a {kind} goes the head alone, and {listed(others)} learned as well')
    return head


def _names_there(flat: Mapping[str, Any], name_map: NameMap) -> dict[str, tuple[str, names.Target] | None]:
    """`{leaf of the network: its tensor's name there and where that goes}`, adapters left out; None where it has none."""
    own = (path for path in flat if not path.partition('/')[2].startswith(f'{ROLE}/'))
    return {path: names.foreign(name_map, path) for path in own}


def _sites(flat: Mapping[str, Any], name: str) -> dict[str, dict[str, np.ndarray]]:
    """`{module: {leaf: array}}` of one adapter."""
    sites: dict[str, dict[str, np.ndarray]] = {}
    start = f'params/{ROLE}/{name}/'
    for path, leaf in flat.items():
        if path.startswith(start):
            site, _, own = path.removeprefix(start).rpartition('/')
            sites.setdefault(site, {})[own] = np.asarray(leaf)
    return sites


def _kind_of(section: Mapping[str, Any]) -> str:
    kind = next((kind for kind, method in METHODS.items() if section['name'] in method.ours), None)
    if kind is None:
        ours = [name for method in METHODS.values() for name in method.ours]
        raise UserError(
            f'--origin=peft: no folder of peft holds a {section["name"]!r}; {nearest(section["name"], ours)}'
        )
    return kind
