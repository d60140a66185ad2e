"""The protocol between the loop and the methods."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax, nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError


class Model(NamedTuple):
    """A network as pure functions; `init` also loads pretrained weights, so what copies them copies the loaded ones.

    Attributes:
      init: (key, inputs) -> variables `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`.
      apply: as a Linen module's: (variables, inputs, train=…, mutable=…, rngs=…) -> endpoints, with `features` [B, D] and,
        where there is a head, `logits` [B, C].
      classify: the head alone: (variables, features [B, D], train=…, rngs=…) -> logits [B, C].
      class_names: () -> those of its logits as the file of its weights says them, which is read then; none where it does not.
    """

    init: Callable
    apply: Callable
    classify: Callable | None = None
    class_names: Callable[[], tuple[str, ...]] = tuple


# Several networks: in a config a list of sections, or one section.
Models = tuple[Model, ...]


class Aux(NamedTuple):
    """What a loss gives besides its value.

    Attributes:
      metrics: scalars to log.
      collections: those that it changed.
      losses: its parts by task, where a gradient is to weigh or combine them; empty for one loss.
      endpoints: of its forward pass, for the wrappers around it, with its `inputs` where they are not the stream's;
        `without_endpoints` takes them away before the gradient.
    """

    metrics: dict[str, Any]
    collections: dict[str, Any]
    losses: dict[str, Any] = {}  # noqa: RUF012 (a mapping of another type would be no pytree)
    endpoints: dict[str, Any] = {}  # noqa: RUF012


class Phase(NamedTuple):
    """One player's move within a step: a loss, and a regex over the trainable parameters that it moves."""

    name: str
    loss: Callable
    rule: str


class Fixed(NamedTuple):
    """A network that never learns and that a loss asks.

    Attributes:
      role: its place among the parameters.
      endpoints: (variables, a stream's batch) -> what it says of it, by endpoint [B, …], in evaluation mode.
      reads: the endpoints that the loss reads; it takes the batch's fields `<role>/<endpoint>` in their place if they are there.
      stream: the one of the loss's streams that it sees.
    """

    role: str
    endpoints: Callable
    reads: tuple[str, ...]
    stream: str


class Objective(NamedTuple):
    """A transfer method.

    `variables` are `{'params': {role: …}, 'batch_stats': {role: …}, …}`. In a step they also hold
    `progress = {'step': int32, 'fraction': float32 in [0, 1)}`, the place within the stage: a ramp is a function of it.

    Attributes:
      init: (key, batch) -> variables.
      loss: (variables, batch, key) -> (scalar, Aux), in training mode.
      predict: (variables, batch of an evaluation stream) -> dict of arrays [B, …]; for classification `logits`.
      phases: for several players, their moves in order, with repeats; empty for one loss that moves all.
      refresh: (variables, batches) -> collections, a pass over whole data sets between steps; `batches(stream)` yields the
        stream's examples once, in order, as evaluation batches with `index` and `mask`.
      start: variables -> variables, when a stage begins: what copies loaded or trained values (a target encoder, a
        teacher) is made here. It may add roles and collections, and replace those that `init` only shaped.
      figures: predictions of all examples, as numpy arrays [N, …] -> {name: float}; None for classification by `logits`.
      export: variables -> those of the adapted network under the names that its model gives them, where they are not there
        yet; what another run loads.
      fixed: networks that never learn: no rule reaches them.
      altered: whether the loss shows its network other inputs than the stream's (hidden tokens, mixed images).
      streams: those that the loss reads.
    """

    init: Callable
    loss: Callable
    predict: Callable
    phases: tuple[Phase, ...] = ()
    refresh: Callable | None = None
    start: Callable | None = None
    figures: Callable | None = None
    export: Callable | None = None
    fixed: tuple[Fixed, ...] = ()
    altered: bool = False
    streams: tuple[str, ...] = ('train',)


# A model's name for what it sees of a text: the field of the batch, in which `mask` says which rows are examples.
TEXT_FIELDS = {'tokens': 'tokens', 'mask': 'token_mask', 'segments': 'segments'}


def inputs_of(stream: dict[str, Any], prefix: str = '') -> Any:
    """What a model sees of a stream's batch: `image` [B, H, W, C], `inputs` [B, F] of a table, or `tokens` [B, L].

    A text whose padding or whose second part is marked is `{'tokens', 'mask', 'segments'}`, as far as it has them.

    Where a frozen backbone has seen them already (`tl_jax.features`), `{'features': [B, D]}`.
    """
    if prefix + 'features' in stream:
        return {'features': stream[prefix + 'features']}
    named = {name: stream[prefix + field] for name, field in TEXT_FIELDS.items() if prefix + field in stream}
    if len(named) > 1:
        return named
    for field in ('image', 'inputs', 'tokens'):
        if prefix + field in stream:
            return stream[prefix + field]
    if prefix in ('support_', 'query_'):
        raise UserError(
            f'config.data: this objective learns from episodes, and these examples have {", ".join(stream)}; give the source '
            'episodes=dict(ways=5, shots=1, queries=5)'
        )
    raise UserError(f'config.data: a network takes image, inputs or tokens; these examples have {", ".join(stream)}')


def label_of(stream: dict[str, Any], field: str = 'label') -> Array:
    """The labels [B] of a stream's batch, or what else it is to be: `token_label` [B, L], `target` [B]."""
    if field not in stream:
        raise UserError('config.data: labels are wanted of a stream or split that has none; take away its `unlabelled`')
    return stream[field]


def targets_of(stream: dict[str, Any], num_classes: int) -> Float[Array, 'batch classes']:
    """What a stream's batch is to be: `target` [B, C], rows summing to 1, where a view has mixed it, else one-hot labels."""
    return stream['target'] if 'target' in stream else nn.one_hot(label_of(stream), num_classes)


def network_of(variables: Any) -> dict[str, Any]:
    """What a network is applied with: its parameters and batch statistics, without what methods keep beside them."""
    return {name: variables[name] for name in ('params', 'batch_stats') if name in variables}


def started(objective: Objective, variables: Any) -> Any:
    """The variables with what the objective copies from loaded or trained ones."""
    return objective.start(variables) if objective.start else variables


def refreshed(objective: Objective, variables: Any, batches: Callable) -> dict[str, Any]:
    """The collections that the objective's pass over whole data sets gives; none where it makes none."""
    return objective.refresh(variables, batches) if objective.refresh else {}


def phases_of(objective: Objective) -> tuple[Phase, ...]:
    """The moves of a step: one that moves everything, unless the objective says otherwise."""
    return objective.phases or (Phase('train', objective.loss, '.*'),)


def with_loss(objective: Objective, change: Callable[[Callable], Callable]) -> Objective:
    """The objective, `change` applied to its loss and to that of each of its phases."""
    phases = tuple(phase._replace(loss=change(phase.loss)) for phase in objective.phases)
    return objective._replace(loss=change(objective.loss), phases=phases)


def without_endpoints(objective: Objective) -> Objective:
    """The objective as a gradient takes it: what its wrappers had to see is let go."""

    def change(loss):
        def loss_alone(variables, batch, key):
            value, aux = loss(variables, batch, key)
            return value, aux._replace(endpoints={})

        return loss_alone

    return with_loss(objective, change)


def forward(model: Model, variables: Any, inputs: Any, key: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    """Applies a model in training mode; returns its endpoints, and the collections that moved."""
    endpoints, moved = model.apply(variables, inputs, train=True, mutable=['batch_stats'], rngs={'dropout': key})
    return endpoints, dict(moved)


def cross_entropy(
    logits: Float[Array, 'batch classes'], label: Int[Array, 'batch'], smoothing: float = 0.0
) -> Float[Array, 'batch']:
    """Nats per example, against labels smoothed as in Szegedy et al. 2016 (arXiv:1512.00567, sec. 7)."""
    target = optax.smooth_labels(nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), target)


def accuracy(logits: Float[Array, 'batch classes'], label: Int[Array, 'batch']) -> Float[Array, '']:
    """Share of examples whose highest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, -1) == label)


def unit(x: Float[Array, 'rows dim']) -> Float[Array, 'rows dim']:
    """Rows of length 1, in float32."""
    x = x.astype(jnp.float32)
    # The floor stands under the root: the gradient at zero is then zero, not NaN.
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def role(name: str, model: Model) -> Model:
    """The whole network as one role: its variables are `params/<name>/…`, `batch_stats/<name>/…`."""

    def inside(variables):
        return {collection: tree[name] for collection, tree in variables.items() if name in tree}

    def around(variables):
        return {collection: {name: tree} for collection, tree in variables.items()}

    return _renamed(model, inside, around)


def recast(model: Model, **players: str) -> Model:
    """The network with some roles played by others: `recast(model, head='second_head')`, `recast(model, backbone='target')`.

    `init` gives the players' variables under their own names.
    """

    def inside(variables):
        return {collection: in_parts(tree) for collection, tree in variables.items()}

    def in_parts(tree):
        # The players' own names go: what Linen was not asked about it would hand back as if it had moved.
        others = {name: subtree for name, subtree in tree.items() if name not in players.values()}
        return {**others, **{part: tree[player] for part, player in players.items() if player in tree}}

    def around(variables):
        return {c: {players.get(part, part): sub for part, sub in tree.items()} for c, tree in variables.items()}

    return _renamed(model, inside, around)


def _renamed(model: Model, inside: Callable, around: Callable) -> Model:
    """The network, its variables called otherwise outside: `inside` gives them its own names, `around` takes them away."""

    def init(key, inputs):
        return around(model.init(key, inputs))

    def apply(variables, inputs, *, mutable=False, **options):
        if mutable is False:
            return model.apply(inside(variables), inputs, **options)
        outputs, moved = model.apply(inside(variables), inputs, mutable=mutable, **options)
        return outputs, around(moved)

    def classify(variables, features, **options):
        return model.classify(inside(variables), features, **options)

    return model._replace(init=init, apply=apply, classify=classify)
