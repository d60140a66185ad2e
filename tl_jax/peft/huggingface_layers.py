"""Adapters of layers in folders of `peft`, LoRA and (IA)³: read into our sections and leaves, and written back."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tl_jax.errors import UserError
from tl_jax.peft.lora import dora, lora, rslora
from tl_jax.peft.scaling import ia3

Leaves = Mapping[str, Mapping[str, np.ndarray]]  # {module: {leaf: array}}


class Place(NamedTuple):
    """A module of theirs and the modules of ours that it is; several stand side by side along its outputs."""

    module: str
    sites: tuple[str, ...]
    inputs_first: bool = False


class Part(NamedTuple):
    """One of our adapters: its section of the config, and its leaves by module."""

    section: Mapping[str, Any]
    leaves: dict[str, dict[str, np.ndarray]]


class Method(NamedTuple):
    """A `peft_type`.

    Attributes:
      ours: the adapters that are of this method.
      read: (config, {module: {part: array}}, {module: Place}, backbone, folder) -> ({suffix: section}, {suffix: Leaves});
        the suffixes tell several adapters of one folder apart.
      write: ([Part], site -> Place, flat variables, backbone) -> (fields of the config, {name: tensor}).
      settings: fields of the config that may be set: to the values given, or to any where that is `...`.
    """

    ours: tuple[str, ...]
    read: Callable
    write: Callable
    settings: Mapping[str, Any]


# What every folder says and we need not know: tensors say themselves where they belong.
COMMON = {
    name: ...
    for name in (
        'auto_mapping',
        'base_model_name_or_path',
        'bias',
        'exclude_modules',
        'fan_in_fan_out',
        'inference_mode',
        'layers_pattern',
        'layers_to_transform',
        'modules_to_save',
        'peft_type',
        'peft_version',
        'revision',
        'target_modules',
        'task_type',
    )
}
_LORA_SETTINGS = COMMON | {
    **{name: ... for name in ('alpha_pattern', 'lora_alpha', 'lora_dropout', 'r', 'rank_pattern')},
    **{name: (True,) for name in ('use_dora', 'use_rslora')},
    # Whatever else it can be changes the base's weights, which the folder does not hold.
    'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal'),
    'eva_config': ...,
    'megatron_core': ...,
    'qalora_group_size': ...,
}


def defaults(constructor: Callable, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section's fields with what it leaves out."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters} | {k: v for k, v in section.items() if k != 'name'}


def rule_of(sites: Iterable[str]) -> str:
    """A regex of exactly these modules: `backbone/block(1|2)/attention/(key|query)`."""
    numbered: dict[str, set[int]] = {}
    for site in sites:
        number = re.search(r'\d+(?=/)', site)
        template = site if number is None else f'{site[: number.start()]}#{site[number.end() :]}'
        numbered.setdefault(template, set()).update([int(number[0])] if number else [])
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for template, numbers in numbered.items():
        module, slash, name = template.rpartition('/')
        together.setdefault((module + slash, tuple(sorted(numbers))), []).append(name)
    return '|'.join(
        f'{re.escape(module)}{_either(sorted(names))}'.replace(r'\#', _either(map(str, numbers)))
        for (module, numbers), names in together.items()
    )


def _either(texts: Iterable[str]) -> str:
    texts = [re.escape(text) for text in texts]
    return texts[0] if len(texts) == 1 else f'({"|".join(texts)})'


def _read_lora(config, modules, places, backbone, folder) -> tuple[dict, dict]:
    del backbone
    method = 'dora' if config.get('use_dora') else 'rslora' if config.get('use_rslora') else 'lora'
    rank, alpha = _number(config, 'r', 8, folder), _number(config, 'lora_alpha', 8, folder)
    grouped: dict[tuple[int, float], dict[str, dict[str, np.ndarray]]] = {}
    for module, tensors in modules.items():
        a, b = _pair(tensors, module, folder)
        own_rank = _by_pattern(config, 'rank_pattern', module, rank, folder)
        if own_rank != a.shape[0] or b.shape[1] != a.shape[0]:
            raise UserError(f'{folder}: {module!r:.120} is of rank {a.shape[0]}, and its configuration says {own_rank}')
        own_alpha = _by_pattern(config, 'alpha_pattern', module, alpha, folder)
        if method == 'dora' and config.get('use_rslora'):
            own_alpha *= math.sqrt(own_rank)  # our dora divides by r
        leaves = _lora_leaves(a, b, tensors.get('lora_magnitude_vector'), places[module], method, folder)
        grouped.setdefault((int(own_rank), float(own_alpha)), {}).update(leaves)
    if not grouped:
        raise UserError(f'{folder}: holds no tensors of an adapter; fetch it again')
    # The adapter of the configuration's own rank goes by the name alone.
    ordered = sorted(grouped, key=lambda key: key != (rank, alpha))
    suffixes = {key: '' if number == 1 else f'_{number}' for number, key in enumerate(ordered, 1)}
    dropout = _number(config, 'lora_dropout', 0.0, folder)
    sections = {
        suffixes[key]: dict(name=method, rank=key[0], alpha=key[1], dropout=dropout, targets=rule_of(grouped[key]))
        for key in ordered
    }
    return sections, {suffixes[key]: grouped[key] for key in ordered}


def _pair(tensors: Mapping[str, np.ndarray], module: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module, the rank first and last, whatever the kind of layer."""
    for one, other in (('lora_A', 'lora_B'), ('lora_embedding_A', 'lora_embedding_B')):
        if {one, other} <= set(tensors) <= {one, other, 'lora_magnitude_vector'}:
            a, b = tensors[one], tensors[other]
            if a.ndim in (2, 4) and b.ndim >= 2 and b.size == b.shape[0] * b.shape[1]:
                return a, b.reshape(b.shape[:2])
    raise UserError(f'{folder}: {module!r:.120} has not the two factors of a LoRA; fetch it again')


def _lora_leaves(a, b, magnitude, place: Place, method: str, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """A module's leaves: A as [rows, rank], B as [rank, columns] shared out to the modules of ours side by side."""
    if (magnitude is None) != (method != 'dora'):
        raise UserError(f'{folder}: {place.module!r:.120} has a magnitude without use_dora, or none with it')
    count = len(place.sites)
    if b.shape[0] % count or (magnitude is not None and magnitude.size != b.shape[0]):
        raise UserError(f'{folder}: {place.module!r:.120} has B of {b.shape[0]} rows; is it the right model?')
    a = a.T if a.ndim == 2 else a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])
    leaves = {}
    for number, site in enumerate(place.sites):
        part = slice(number * len(b) // count, (number + 1) * len(b) // count)
        leaves[site] = {'lora_a': a, 'lora_b': b[part].T}
        if magnitude is not None:
            leaves[site]['magnitude'] = magnitude.reshape(-1)[part]
    return leaves


def _write_lora(parts: list[Part], place_at, flat, backbone) -> tuple[dict, dict]:
    del backbone
    by_module: dict[Place, list[tuple[float, str, dict[str, np.ndarray]]]] = {}
    for part in parts:
        fields = defaults(CONSTRUCTORS[part.section['name']], part.section)
        root = fields['rank'] if part.section['name'] != 'rslora' else math.sqrt(fields['rank'])
        for site, leaves in part.leaves.items():
            by_module.setdefault(place_at(site), []).append((fields['alpha'] / root, site, leaves))
    first = parts[0].section
    methods = {part.section['name'] for part in parts}
    rescaled, magnitudes = methods == {'rslora'}, methods == {'dora'}
    if 'dora' in methods and not magnitudes:
        raise UserError('--origin=peft: the adapters are of DoRA and of LoRA; export one alone')
    tensors, ranks, alphas = {}, {}, {}
    for place, entries in by_module.items():
        own, scale = _joint(place, entries, flat, magnitudes)
        tensors |= own
        ranks[place.module] = rank = next(t for name, t in own.items() if '_A' in name).shape[0]
        alphas[place.module] = scale * (math.sqrt(rank) if rescaled else rank)
    rank, alpha = (max(set(values.values()), key=list(values.values()).count) for values in (ranks, alphas))
    return {
        'r': rank,
        'lora_alpha': _plain_number(alpha),
        'rank_pattern': {module: each for module, each in ranks.items() if each != rank},
        'alpha_pattern': {module: _plain_number(each) for module, each in alphas.items() if each != alpha},
        'lora_dropout': first.get('dropout', 0.0),
        'target_modules': sorted(ranks),
        'fan_in_fan_out': any(place.inputs_first for place in by_module),
        'use_rslora': rescaled,
        'use_dora': magnitudes,
        'bias': 'none',
        'init_lora_weights': True,
    }, tensors


def _joint(place: Place, entries, flat, magnitudes: bool) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of a module of theirs, from one or several low-rank adapters on one or several modules of ours.

    The sum of B_i A_i is the product of the B_i side by side and the A_i above each other; what stands beside another module
    has zeros for its rows.
    """
    scale = entries[0][0]
    matrices = {site: _matrix(flat, site) for site in place.sites}
    width = next(iter(matrices.values())).shape[-1]
    if magnitudes and len({site for _, site, _ in entries}) < len(entries):
        raise UserError(f'--origin=peft: two DoRA adapters on {place.module!r}; their magnitudes cannot be joined')
    shared = all(np.array_equal(leaves['lora_a'], entries[0][2]['lora_a']) for _, _, leaves in entries)
    above = [entries[0][2]['lora_a']] if shared else [leaves['lora_a'] for _, _, leaves in entries]
    b = np.zeros((width * len(place.sites), sum(a.shape[1] for a in above)), np.float32)
    at = 0
    for own_scale, site, leaves in entries:
        rows, rank = place.sites.index(site) * width, leaves['lora_b'].shape[0]
        b[rows : rows + width, at : at + rank] += leaves['lora_b'].T * np.float32(own_scale / scale)
        at += 0 if shared else rank
    a = np.concatenate(above, axis=1)
    kernel = next(iter(matrices.values()))
    if f'params/{place.sites[0]}/embedding' in flat:
        if magnitudes:
            raise UserError(
                f'--origin=peft: DoRA of the embedding {place.module!r} is another thing there; leave it out'
            )
        return {f'{place.module}.lora_embedding_A': a.T, f'{place.module}.lora_embedding_B': b}, scale
    if kernel.ndim == 4:
        a, b = a.reshape(*kernel.shape[:3], -1).transpose(3, 2, 0, 1), b[:, :, None, None]
    else:
        a = a.T
    tensors = {f'{place.module}.lora_A.weight': a, f'{place.module}.lora_B.weight': b}
    if magnitudes:
        learned = {site: leaves['magnitude'] for _, site, leaves in entries}
        norms = [learned.get(s, np.linalg.norm(m.reshape(-1, width), axis=0)) for s, m in matrices.items()]
        shape = (1, -1, 1, 1) if kernel.ndim == 4 else (-1,)
        tensors[f'{place.module}.lora_magnitude_vector'] = np.concatenate(norms).reshape(shape)
    return tensors, scale


def _matrix(flat: Mapping[str, Any], site: str) -> np.ndarray:
    return np.asarray(next(flat[p] for p in (f'params/{site}/kernel', f'params/{site}/embedding') if p in flat))


def _read_ia3(config, modules, places, backbone, folder) -> tuple[dict, dict]:
    del backbone
    leaves, hidden = {}, []
    for module, tensors in modules.items():
        if set(tensors) != {'ia3_l'}:
            raise UserError(f'{folder}: {module!r:.120} has not the one vector of (IA)³; fetch it again')
        place, factor = places[module], tensors['ia3_l']
        before = _is_hidden(config, module)
        if before != (factor.ndim == 2 and factor.shape[0] == 1) and factor.size > 1 and factor.ndim == 2:
            raise UserError(
                f'{folder}: feedforward_modules does not tell how {module!r:.120} is scaled; fetch it again'
            )
        if before:
            hidden += place.sites
        if not before and factor.size % len(place.sites):
            raise UserError(f'{folder}: {module!r:.120} has {factor.size} outputs; is it the right model?')
        flat = factor.reshape(-1)
        split = [flat] * len(place.sites) if before else np.split(flat, len(place.sites))
        leaves |= {site: {'ia3': own} for site, own in zip(place.sites, split, strict=True)}
    if not leaves:
        raise UserError(f'{folder}: holds no tensors of an adapter; fetch it again')
    section = dict(name='ia3', targets=rule_of(leaves), hidden=rule_of(hidden) if hidden else '')
    return {'': section}, {'': leaves}


def _is_hidden(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module's inputs are scaled, as `peft` tells it: by the end of its name."""
    listed = config.get('feedforward_modules') or []
    listed = [listed] if isinstance(listed, str) else listed
    return any(module == each or module.endswith(f'.{each}') for each in listed)


def _write_ia3(parts: list[Part], place_at, flat, backbone) -> tuple[dict, dict]:
    del backbone
    if len(parts) > 1:
        raise UserError('--origin=peft: several adapters of (IA)³ are not one folder; export one alone')
    fields = defaults(ia3, parts[0].section)
    by_place: dict[Place, dict[str, np.ndarray]] = {}
    for site, leaves in parts[0].leaves.items():
        by_place.setdefault(place_at(site), {})[site] = leaves['ia3']
    tensors, hidden = {}, []
    for place, factors in by_place.items():
        kernel = _matrix(flat, place.sites[0])
        tail = (1, 1) if kernel.ndim == 4 else ()
        if re.fullmatch(fields['hidden'], next(iter(factors))):
            hidden.append(place.module)
            if len(place.sites) > 1:
                raise UserError(f'--origin=peft: {place.module!r} has one input for {len(place.sites)} of our modules')
            shape = (1, -1, *tail)
        else:
            shape = (1, -1, *tail) if tail else (-1, 1)
        whole = [factors.get(site, np.ones(kernel.shape[-1], np.float32)) for site in place.sites]
        tensors[f'{place.module}.ia3_l'] = np.concatenate(whole).reshape(shape)
    modules = sorted(place.module for place in by_place)
    conv1d = any(place.inputs_first for place in by_place)
    return {'target_modules': modules, 'feedforward_modules': sorted(hidden), 'fan_in_fan_out': conv1d}, tensors


def _number(config: Mapping[str, Any], field: str, default: float, folder: Path) -> float:
    value = config.get(field, default)
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise UserError(f'{folder}: {field} of its configuration is {value!r:.80}, no number that it could be')
    return value


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: float, folder: Path) -> float:
    """A module's own rank or alpha: of the first name in the pattern's table that the module's ends with."""
    table = config.get(field) or {}
    if not isinstance(table, Mapping):
        raise UserError(f'{folder}: {field} of its configuration is no table')
    for key in table:
        plain = key.replace('\\.', '.').removeprefix('^').removesuffix('$')
        if not re.fullmatch(r'[\w.-]+', plain):
            raise UserError(f'{folder}: {field} has the expression {key!r:.80}; give plain names of modules there')
        if module == plain or (not key.startswith('^') and module.endswith(f'.{plain}')):
            return _number(table, key, default, folder)
    return default


def _plain_number(value: float) -> float | int:
    value = round(float(value), 9)
    return int(value) if value.is_integer() else value


CONSTRUCTORS = {'lora': lora, 'rslora': rslora, 'dora': dora}
METHODS: dict[str, Method] = {
    'LORA': Method(('lora', 'rslora', 'dora'), _read_lora, _write_lora, _LORA_SETTINGS),
    'IA3': Method(
        ('ia3',),
        _read_ia3,
        _write_ia3,
        COMMON | {'feedforward_modules': ..., 'init_ia3_weights': ...},
    ),
}
