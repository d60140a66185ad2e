"""How an adapter enters a network from outside: at the calls of the modules that a rule names. The network stays as it is.

An adapted network is a `Model` like any other. Its adapters are the role `adapters`, `adapters/<adapter>/<module>/<leaf>`,
and what of them never learns (random projections, indices) the collection `adapter_constants`, under the same names.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import Model
from tl_jax.peft.quantized import holds_codes, kept_whole
from tl_jax.trees import nearest_paths

ROLE = 'adapters'
CONSTANTS = 'adapter_constants'
SHARED = 'shared'


class Site(NamedTuple):
    """A module of the network that an adapter changes.

    Attributes:
      path: of the module, as of its leaves: `backbone/block1/attention/query`.
      kind: 'dense' (whatever the axes of its kernel), 'conv', 'norm', 'embed' (a table), or 'module' for anything else.
      inputs: shape and dtype of its first argument.
      outputs: shape and dtype of what it gives.
      weights: `{leaf: shape and dtype}` of the leaves that are the module's own.
      place: its number, from 0, among the adapter's sites in the order of their calls.
      places: how many those are.
      module: the Linen module itself, unbound; for what depends on its fields, such as the strides of a convolution.
    """

    path: str
    kind: str
    inputs: Any
    outputs: Any
    weights: dict[str, Any]
    place: int
    places: int
    module: Any = None


class Parts(NamedTuple):
    """What an adapter has at one site, each `{leaf: array}`.

    Attributes:
      params: what learns.
      constants: what does not.
      weights: new values of leaves of the module itself, where the start must change them (PiSSA); from `init` only.
    """

    params: dict[str, Any]
    constants: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default is never written to)
    weights: dict[str, Any] = {}  # noqa: RUF012


class Call(NamedTuple):
    """A module being called.

    Attributes:
      run: the module as it is (or as the adapters before this one have made it): `run(inputs, **changed keyword arguments)`.
      inputs: its first argument.
      kwargs: its other arguments by name, such as `mask`.
      weights: its own leaves, for what needs them; an adapter that reads none costs no gradient of them.
      drop: `drop(rate, x)`: dropout in training, the identity otherwise.
    """

    run: Callable
    inputs: Any
    kwargs: dict[str, Any]
    weights: dict[str, Any]
    drop: Callable


class Adapter(NamedTuple):
    """A parameter-efficient method; made by a constructor whose keyword arguments are the fields of `config.model.peft`.

    Attributes:
      init: (key, Site, weights) -> Parts, with which the network computes exactly what it did, or see `identity`.
      call: (Parts, Call, Site) -> the module's outputs; None where the network runs on the merged weights, whose dense
        gradient it then cannot avoid.
      merge: (Parts, weights, Site) -> the module's own leaves that have the adapter in them; None where none can.
      unmerge: (Parts, merged weights, Site) -> the leaves before; None where they cannot be got back.
      share: (key, sites) -> constants that all sites have in common, `{leaf: array}`; they are in the constants of each.
      prepare: `{path: Parts}` -> the same with what is computed once a pass, from parts that sites share.
      around: (`{path: Parts}`, apply, inputs) -> endpoints: what it does to the network's inputs and endpoints, `apply`
        being the network with the sites adapted; None for nothing.
      kinds: the kinds of site that it can change.
      by_kind: whether it means only those, of all modules that the rule names.
      targets: a regex of module paths, or None for the family's own (`tl_jax.peft.targets`).
      identity: whether the network computes at the start exactly what it did; prompts are there from the start.
      suits: the families that have what the adapter needs, in words, for error messages.
    """

    init: Callable
    call: Callable | None = None
    merge: Callable | None = None
    unmerge: Callable | None = None
    share: Callable | None = None
    prepare: Callable | None = None
    around: Callable | None = None
    kinds: tuple[str, ...] = ('dense',)
    by_kind: bool = False
    targets: str | None = None
    identity: bool = True
    suits: str = ''


def modules_of(model: Model, variables: Any, inputs: Any) -> tuple[Site, ...]:
    """Every module of the network that is called, in the order of the calls; nothing is computed."""
    called: dict[str, tuple[Any, Any]] = {}
    modules: dict[str, nn.Module] = {}

    def record(run, args, kwargs, context):
        if context.method_name != '__call__' or not context.module.path:
            return run(*args, **kwargs)
        path = '/'.join(context.module.path)
        modules.setdefault(path, context.module)
        outputs = run(*args, **kwargs)
        called.setdefault(path, (args[0] if args else None, outputs))
        return outputs

    def shapes(variables, inputs):
        with nn.intercept_methods(record):
            model.apply(variables, inputs, train=False)
        # No dict: JAX would sort it, block10 ahead of block2.
        return [called[path] for path in modules]

    shapes_of, sites = jax.eval_shape(shapes, variables, inputs), []
    for place, (path, module) in enumerate(modules.items()):
        leaves = {name: _shape(leaf) for name, leaf in own_leaves(variables['params'], path).items()}
        kind = _kind(leaves, *shapes_of[place])
        sites.append(Site(path, kind, *map(_shape, shapes_of[place]), leaves, place, len(modules), module))
    return tuple(sites)


def sites_of(modules: Sequence[Site], adapter: Adapter, targets: str, field: str) -> tuple[Site, ...]:
    """The modules that a rule names.

    Args:
      modules: of the network.
      adapter: that is to enter.
      targets: regex of module paths (`re.fullmatch`).
      field: of the rule in the config, for error messages.

    Raises:
      UserError: the rule is malformed, matches no module, or one of a kind that the adapter cannot change.
    """
    pattern = trees.compiled(targets, field)
    found = [module for module in modules if pattern.fullmatch(module.path)]
    found = [module for module in found if module.kind in adapter.kinds or not adapter.by_kind]
    if not found:
        fit = f'it suits {adapter.suits}; ' if adapter.suits else ''
        near = nearest_paths(targets, [module.path for module in modules])
        raise UserError(f"{field}: the rule '{targets}' names no module; {fit}{near}")
    other = next((module for module in found if module.kind not in adapter.kinds), None)
    if other is not None:
        raise UserError(
            f"{field}: '{other.path}' is a {other.kind}, and this adapter changes {' and '.join(adapter.kinds)}; narrow the rule"
        )
    return tuple(
        site._replace(place=place, places=len(found), module=site.module.clone(parent=None))
        for place, site in enumerate(found)
    )


def adapted(model: Model, adapters: Mapping[str, tuple[Adapter, str]], *, active: Sequence[str] | None = None) -> Model:
    """The network with adapters, each at the modules that its rule names; with those not `active` as if they were not there.

    Args:
      model: the network.
      adapters: `{name: (adapter, regex of module paths)}`; where several meet, the later one is the outer one, and those
        that run on merged weights are within all others.
      active: names of those that act; all unless given.
    """
    active = list(adapters) if active is None else list(active)
    field = 'config.model.peft'
    unknown = next((name for name in active if name not in adapters), None)
    if unknown is not None:
        raise UserError(f"{field}: there is no adapter '{unknown}' to switch on; there are {', '.join(adapters)}")

    def init(key, inputs):
        variables = dict(model.init(key, inputs))
        params, constants = dict(variables['params']), {}
        modules = modules_of(model, variables, inputs)
        for number, (name, (adapter, targets)) in enumerate(adapters.items()):
            mine, own_key = {}, jax.random.fold_in(key, number + 1)
            sites = sites_of(modules, adapter, targets, f'{field}.{name}')
            for site in sites:
                drawn = jax.random.fold_in(own_key, site.place)
                mine[site.path] = adapter.init(drawn, site, own_leaves(params, site.path))
                params = trees.merge(params, _nest({site.path: mine[site.path].weights}))
            trained = {path: parts.params for path, parts in mine.items()}
            params = trees.merge(params, {ROLE: {name: _nest(trained)}})
            constants = trees.merge(constants, {name: _nest({path: parts.constants for path, parts in mine.items()})})
            if adapter.share is not None:
                shared = adapter.share(jax.random.fold_in(own_key, len(sites)), sites)
                constants = trees.merge(constants, {name: {SHARED: shared}})
        variables['params'] = params
        if trees.flatten(constants):
            variables[CONSTANTS] = {ROLE: constants}
        return variables

    def apply(variables, inputs, **options):
        network, moved = without(variables), []
        entering: dict[str, list] = {}
        surrounding = []
        # The modules again, by shape: a pure function cannot remember what `init` found.
        modules = modules_of(model, network, inputs) if active else ()
        for name in active:
            adapter, targets = adapters[name]
            sites = sites_of(modules, adapter, targets, f'{field}.{name}')
            mine = {site.path: parts_of(variables, name, site.path) for site in sites}
            mine = adapter.prepare(mine) if adapter.prepare else mine
            if adapter.call is None and adapter.merge is not None:
                network = {**network, 'params': _merged(network['params'], adapter.merge, sites, mine)}
                network = kept_whole(network, [site.path for site in sites])
            elif adapter.call is not None:
                for site in sites:
                    entering.setdefault(site.path, []).append((adapter, site, mine[site.path]))
            if adapter.around is not None:
                surrounding.append((adapter.around, mine))

        def run(inputs):
            train = options.get('train', False)
            with nn.intercept_methods(_interceptor(entering, network['params'], train)):
                outputs = model.apply(network, inputs, **options)
            if not options.get('mutable'):
                return outputs
            moved.append(outputs[1])
            return outputs[0]

        for around, mine in surrounding:
            run = lambda inputs, around=around, mine=mine, run=run: around(mine, run, inputs)
        endpoints = run(inputs)
        return (endpoints, moved[-1]) if options.get('mutable') else endpoints

    def classify(variables, features, **options):
        return model.classify(without(variables), features, **options)

    return Model(init, apply, classify)


def merged(model: Model, adapters: Mapping[str, tuple[Adapter, str]], variables: Any, inputs: Any) -> dict[str, Any]:
    """The variables of the plain network that computes what the adapted one does.

    Raises:
      UserError: an adapter cannot be merged, or the base is held in few bits, which would have to be restored first
        (`tl_jax.peft.quantized.restored`).
    """
    network = without(variables)
    if holds_codes(network['params']):
        raise UserError(
            'config.model.quantize: the base is held in few bits, and merging would make it whole again; ask for that by '
            'restoring it first'
        )
    modules = modules_of(model, network, inputs)
    for name, (adapter, targets) in _innermost_first(adapters).items():
        field = f'config.model.peft.{name}'
        if adapter.merge is None or adapter.around is not None:
            raise UserError(f'{field}: acts on activations, which no weights can hold; it cannot be merged')
        sites = sites_of(modules, adapter, targets, field)
        _refuse_reparametrized(adapter, sites, field)
        mine = {site.path: parts_of(variables, name, site.path) for site in sites}
        network = {**network, 'params': _merged(network['params'], adapter.merge, sites, mine)}
    return network


def unmerged(
    model: Model, adapters: Mapping[str, tuple[Adapter, str]], network: Any, variables: Any, inputs: Any
) -> dict[str, Any]:
    """The plain network's variables as they were before `merged`, to half a unit in the last place of the merged ones.

    Args:
      model: the plain network.
      adapters: as they were merged.
      network: the merged variables.
      variables: those of the adapted network, of which only the adapters are read.
      inputs: one batch.

    Raises:
      UserError: an adapter cannot be taken out again.
    """
    modules = modules_of(model, network, inputs)
    for name, (adapter, targets) in reversed(_innermost_first(adapters).items()):
        field = f'config.model.peft.{name}'
        if adapter.unmerge is None:
            raise UserError(f'{field}: cannot be taken out of merged weights again; keep the weights from before')
        sites = sites_of(modules, adapter, targets, field)
        mine = {site.path: parts_of(variables, name, site.path) for site in sites}
        network = {**network, 'params': _merged(network['params'], adapter.unmerge, sites, mine)}
    return network


def without(variables: Any) -> dict[str, Any]:
    """The network's own variables."""
    own = {name: tree for name, tree in variables.items() if name != CONSTANTS}
    return {**own, 'params': {role: tree for role, tree in own['params'].items() if role != ROLE}}


def parts_of(variables: Any, adapter: str, path: str) -> Parts:
    """What the adapter has at one site."""
    steps = [ROLE, adapter, *path.split('/')]
    constants = variables.get(CONSTANTS, {})
    shared = _descend(constants, [ROLE, adapter, SHARED])
    return Parts(_descend(variables['params'], steps), {**shared, **_descend(constants, steps)})


def own_leaves(params: Any, path: str) -> dict[str, Any]:
    """The leaves that stand in the module itself; {} where it has none."""
    return {name: leaf for name, leaf in _descend(params, path.split('/')).items() if not isinstance(leaf, Mapping)}


def _innermost_first(adapters: Mapping[str, tuple[Adapter, str]]) -> dict[str, tuple[Adapter, str]]:
    return dict(sorted(adapters.items(), key=lambda item: item[1][0].call is not None))


def _merged(params: Any, merge: Callable, sites: Sequence[Site], mine: Mapping[str, Parts]) -> dict[str, Any]:
    changed = [_nest({s.path: merge(mine[s.path], own_leaves(params, s.path), s)}) for s in sites]
    return trees.merge(params, *changed)


def reparametrized(site: Site) -> bool:
    """Whether a convolution does not use its kernel as it is stored, as BiT's."""
    return getattr(site.module, 'reparametrize', None) is not None


def _refuse_reparametrized(adapter: Adapter, sites: Sequence[Site], field: str) -> None:
    for site in sites:
        if adapter.call is not None and reparametrized(site):
            raise UserError(
                f"{field}: '{site.path}' standardises its kernel, which cannot hold an adapter; do not merge"
            )


def _interceptor(entering: Mapping[str, list], params: Any, train: bool) -> Callable:
    """Runs each module in `entering` with its adapters around it, the first the innermost; `train` is the whole network's."""

    def intercept(run, args, kwargs, context):
        chain = entering.get('/'.join(context.module.path)) if context.method_name == '__call__' else None
        if not chain:
            return run(*args, **kwargs)

        def drop(rate, x):
            if not rate or not train:
                return x
            keep = jax.random.bernoulli(context.module.make_rng('dropout'), 1 - rate, x.shape)
            return jnp.where(keep, x / (1 - rate), 0)

        # By name, so that an adapter can read and replace what a module was given by position.
        names = list(inspect.signature(type(context.module).__call__).parameters)[2:]
        named = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        layer = lambda inputs, **changed: run(inputs, **{**named, **changed})
        weights = own_leaves(params, chain[0][1].path)
        for number, (adapter, site, parts) in enumerate(chain):
            if number and chain[number - 1][0].merge is not None:
                inner, at, its = chain[number - 1]
                weights = inner.merge(its, weights, at)
            layer = functools.partial(_called, adapter, site, parts, weights, layer, named, drop)
        return layer(args[0])

    return intercept


def _called(adapter, site, parts, weights, run, kwargs, drop, inputs, **changed):
    return adapter.call(parts, Call(run, inputs, {**kwargs, **changed}, weights, drop), site)


def contracted(kernel: Any, inputs: Any, outputs: Any) -> int:
    """How many of a dense kernel's axes meet the input's last ones; the others make the output's. 0 where it is not dense."""
    for count in range(1, kernel.ndim):
        lead = inputs.shape[: inputs.ndim - count]
        if inputs.shape == (*lead, *kernel.shape[:count]) and outputs.shape == (*lead, *kernel.shape[count:]):
            return count
    return 0


def _kind(weights: Mapping[str, Any], inputs: Any, outputs: Any) -> str:
    if 'embedding' in weights:
        return 'embed'
    if 'kernel' not in weights:
        return 'norm' if 'scale' in weights else 'module'
    if contracted(weights['kernel'], inputs, outputs):
        return 'dense'
    return 'conv' if weights['kernel'].ndim > 2 else 'module'


def _shape(value: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value)


def _descend(tree: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        tree = tree.get(step, {})
    return tree


def _nest(by_path: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return trees.unflatten(
        {f'{path}/{name}': leaf for path, leaves in by_path.items() for name, leaf in leaves.items()}
    )
