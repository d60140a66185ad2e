"""From files and command-line overrides to one checked, plain config; and from a section to a call.

There is no schema beside the code: a section's fields are the keyword arguments of the function it configures, so the
function's signature says what is allowed, of which type, and what the default is.
"""

import ast
import copy
import functools
import importlib.util
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from tl_jax.errors import UserError, nearest

# The fields of a config that are not a section: what the run as a whole does. Durations are in steps.
DEFAULTS = {
    'name': '',  # shown in reports
    'seed': 0,  # of initialisation and of everything drawn during training; `data.seed` has its own
    'model': {},  # tl_jax.models.create_model, plus `source`: see tl_jax.networks.model_from
    'data': {},  # tl_jax.experiment_data.open_data
    'objective': {'name': 'supervised'},  # tl_jax.objectives
    'stages': [],  # each: steps | epochs | examples, train = [(regex, optimizer)], and an objective and gradient of its own
    'batch_size': 32,  # examples a step over all devices
    'eval_batch_size': 256,
    'dtype': 'float32',  # of the computation; parameters and statistics stay float32
    'gradient': {'name': 'plain'},  # tl_jax.gradients
    'clip_norm': 0.0,  # global norm over trainable leaves; 0 for none
    'ema': 0.0,  # decay of the averaged parameters that evaluation then uses; 0 for none; 1 for their plain mean (SWA)
    'ema_from': 0.0,  # share of a stage that is over when its averages begin
    'log_every': 10,
    'eval_every': 0,  # 0: at the end of each stage
    'refresh_every': 0,  # of an objective's pass over whole datasets; 0: at the start of each stage
    'checkpoint_every': 0,  # 0: with every evaluation
    'keep': 2,  # newest checkpoints kept, besides the selected one
    'select_by': 'last',  # or '<evaluation split>/<metric>', or 'oracle' (the test split: never a fair number)
    'report_before': False,  # whether the report also shows the predictions with which the last stage begins
    'patience': 0,  # evaluations without a better `select_by` before a stage ends; 0 for never
    'cache_features': True,  # whether a frozen backbone runs once over each example where it can: tl_jax.features
    'cache_dtype': 'float32',  # of what is cached; or 'float16'
    'cache_teacher': True,  # whether a fixed teacher runs once over each example where it can: tl_jax.teaching
    'cache_top_k': 0,  # of a cached teacher's logits those kept, and the log of the others' mass; 0 for all
    'probe': {},  # of --mode=probe: tl_jax.probe.Protocol
    'mesh': {},  # tl_jax.mesh.create_mesh
    'sharding': [],  # rules over parameters; what none matches is replicated
}


def load(spec: str) -> ml_collections.ConfigDict:
    """Returns the config of `FILE.py[:arg]` or of a stored `config.json`."""
    if spec.endswith('.json'):
        try:
            return ml_collections.ConfigDict(json.loads(Path(spec).read_text()))
        except FileNotFoundError:
            raise UserError(f'--config: there is no {spec}; name a config file with --config') from None
        except (ValueError, TypeError) as error:
            raise UserError(f'--config: {spec} is not a stored config: {error}') from None
    module, arg = load_module(spec)
    if not hasattr(module, 'get_config'):
        raise UserError(f'--config: {spec.partition(":")[0]} defines no get_config(arg)')
    return with_defaults(module.get_config(arg) if arg else module.get_config())


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the fields that a config leaves out, so that the command line can set what is within them."""
    filled = ml_collections.ConfigDict(copy.deepcopy(DEFAULTS))
    with filled.unlocked(), filled.ignore_type():
        for name, value in config.items():
            filled[name] = value
    return filled


def load_module(spec: str) -> tuple[types.ModuleType, str]:
    """Returns the Python module of a config file, and the argument that follows the colon."""
    path, _, arg = spec.partition(':')
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob('*.py')] if file.parent.is_dir() else []
        raise UserError(f"--config: there is no file '{path}'; {nearest(path, siblings)}")
    try:
        return run_file(file), arg
    except UserError as error:
        raise UserError(f'--config: {error}') from None


def run_file(file: Path) -> types.ModuleType:
    """Returns the module that a Python file makes, without importing it by name."""
    loader = importlib.util.spec_from_file_location(f'file_{file.stem}', file)
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f'{file}, line {error.lineno}, is not valid Python: {error.msg}') from None
    return module


def resolved_with(
    read: Callable[[], ml_collections.ConfigDict], assignments: Iterable[str], where: str
) -> dict[str, Any]:
    """The resolved config that `read` gives, with fields set; `where` begins what is said of a mistake in it."""
    try:
        config = read()
        for assignment in assignments:
            override(config, assignment)
        return resolve(config)
    except UserError as error:
        raise UserError(f'{where}: {str(error).removeprefix("--")}') from None


def override(config: ml_collections.ConfigDict, assignment: str) -> None:
    """Sets one field in place: `stages[0].steps=10`, `model.source=weights.pth`, `data.train_transform=[]`.

    The value is read as a Python literal and, failing that, as a string. An index must exist; whether a name is known and
    has the right type is checked by `resolve` and by the call of the function that the field configures.
    """
    target, equals, text = assignment.partition('=')
    if not equals:
        raise UserError(f'--config.{target}: write --config.{target}=VALUE')
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
    keys = [int(k[1:-1]) if k.startswith('[') else k for k in re.findall(r'\[-?\d+\]|[^.\[\]]+', target)]
    node = config
    for depth, key in enumerate(keys[:-1]):
        node = _descend(node, key, 'config.' + _dotted(keys[: depth + 1]))
    key = keys[-1]
    if isinstance(node, tuple):
        raise UserError(f'--config.{target}: a rule is a pair; set a field of its optimizer, …[1].lr, instead')
    if not isinstance(key, int):
        _require_mapping(node, 'config.' + _dotted(keys[:-1]))
    else:
        _descend(node, key, f'config.{target}')
    if isinstance(node, ml_collections.ConfigDict):
        with node.unlocked(), node.ignore_type():
            node[key] = value
    else:
        node[key] = value


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config as plain dicts, lists and scalars with every default filled in; enough to run it again.

    Raises:
      UserError: a top-level field is unknown or of another type than its default.
    """
    given = plain(config)
    for name, value in given.items():
        if name not in DEFAULTS:
            raise UserError(f'config.{name}: unknown field; {nearest(name, DEFAULTS)}')
        check_type(value, type(DEFAULTS[name]), f'config.{name}')
    return plain({**DEFAULTS, **given})


def plain(value: Any) -> Any:
    """Turns ConfigDicts and tuples into dicts and lists, as JSON would store them."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def call(function: Callable, section: Mapping[str, Any], where: str, *args: Any, **extra: Any) -> Any:
    """Calls `function(*args, **section, **extra)`, the section's names and types checked against the signature.

    Args:
      function: its keyword arguments are the fields of the section; annotations give their types.
      section: the config's fields.
      where: the section's name in the config, for the error message.
      *args: positional arguments that do not come from the config.
      **extra: keyword arguments that do not come from the config; a field of the same name is refused.
    """
    parameters = inspect.signature(function).parameters
    hints = _hints(function)
    positional = list(parameters)[: len(args)]
    fields = [name for name in parameters if name not in positional and name not in extra]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in section.items():
        if name not in fields and not open_ended:
            raise UserError(f'{where}.{name}: unknown field; {nearest(name, fields)}')
        if name in hints:
            check_type(value, hints[name], f'{where}.{name}')
    missing = [n for n in fields if parameters[n].default is inspect.Parameter.empty and n not in section]
    missing = [
        n
        for n in missing
        if parameters[n].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if missing:
        raise UserError(f'{where}.{missing[0]}: is required; add {where}.{missing[0]}=…')
    return function(*args, **section, **extra)


def asked(constructor: Callable, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the facts that the constructor has a parameter for."""
    return {name: fact for name, fact in facts.items() if name in inspect.signature(constructor).parameters}


def check_type(value: Any, hint: Any, where: str) -> None:
    """Refuses a value that its annotation does not allow. An int serves as a float; a list as any sequence."""
    allowed = [h for h in (typing.get_args(hint) if _is_union(hint) else (hint,))]
    classes = tuple(c for h in allowed for c in _as_classes(h))
    literals = [v for h in allowed if typing.get_origin(h) is typing.Literal for v in typing.get_args(h)]
    if not classes and not literals:
        return
    good = isinstance(value, classes) and not (
        isinstance(value, bool) and bool not in classes and object not in classes
    )
    if isinstance(value, int) and not isinstance(value, bool) and float in classes:
        good = True
    if literals and value in literals:
        good = True
    if not good:
        wanted = ' or '.join([c.__name__ for c in classes] + [repr(v) for v in literals])
        raise UserError(f'{where}: must be {wanted}, not {type(value).__name__} ({value!r})')


def _hints(function: Callable) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a library's own annotations need not resolve
        return {}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _as_classes(hint: Any) -> tuple[type, ...]:
    """The classes that satisfy a hint; none where the hint says nothing that can be checked here."""
    origin = typing.get_origin(hint) or hint
    if hint is None:
        return (type(None),)
    if origin in (int, float, str, bool, type(None)):
        return (origin,)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return (Mapping,)
    # JSON and the command line give lists where a signature says tuple or Sequence; a string is never meant.
    if isinstance(origin, type) and issubclass(origin, list | tuple | Sequence):
        return (list, tuple)
    return ()


def _descend(node: Any, key: str | int, where: str) -> Any:
    if isinstance(key, int):
        if not isinstance(node, list | tuple):
            raise UserError(f'--{where}: only a list has items')
        if not -len(node) <= key < len(node):
            raise UserError(f'--{where}: there are {len(node)} items, numbered from 0')
        return node[key]
    _require_mapping(node, where.rpartition('.')[0])
    if key not in node:
        raise UserError(f'--{where}: unknown field; {nearest(key, node)}')
    return node[key]


def _require_mapping(node: Any, where: str) -> None:
    if not isinstance(node, Mapping | ml_collections.ConfigDict):
        raise UserError(f'--{where}: is {node!r}, which has no fields')


def _dotted(keys: list[str | int]) -> str:
    return ''.join(f'[{k}]' if isinstance(k, int) else f'.{k}' for k in keys).lstrip('.')
