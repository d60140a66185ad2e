"""Transfer by what the source's own classifier says: its head goes on as a second one, the role `source_head`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError
from tl_jax.objectives.base import Model, Objective, inputs_of, label_of, network_of, recast, refreshed
from tl_jax.objectives.penalties import added, endpoint
from tl_jax.objectives.references import reference_of, with_reference


def lwf(
    objective: Objective,
    *,
    original: Callable[[int], Model],
    stream: str = '',
    weight: float = 1.0,
    temperature: float = 2.0,
    source_classes: int | None = None,
) -> Objective:
    """Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 2–3): the old head goes on saying what it said.

    loss + weight · mean_i -Σ_c y'_c log ŷ'_c,   y' = softmax(old logits / T), ŷ' = softmax(logits of the source head / T)

    The old logits are those of the network as it began, in evaluation mode, on the same inputs: one more forward pass a step.
    The source head is trained by a rule of the stage, `('source_head/.*', …)`, or stays. As in the paper there is no T².

    Args:
      objective: gives `features` in `Aux.endpoints`.
      original: from the source's number of classes to its network; given by the experiment.
      stream: that the forward pass sees; the objective's first unless given.
      weight: λ; 1 in the paper.
      temperature: T; 2 in the paper.
      source_classes: that `config.model.source` tells apart.
    """
    stream = stream or objective.streams[0]
    network = source_network(original, source_classes, 'lwf')

    def penalty(variables, batch, aux, key):
        old = network.apply(reference_of(variables), inputs_of(batch[stream]), train=False)['logits']
        now = network.classify(variables, endpoint(aux, 'features', 'lwf'), train=True, rngs={'dropout': key})
        return weight * soft_cross_entropy(now / temperature, nn.softmax(old.astype(jnp.float32) / temperature)), {}

    wrapped = with_source_head(objective, network, stream)
    field = 'config.objective.lwf'
    return added(with_reference(wrapped, '(backbone|source_head)/.*', field, statistics=True), 'lwf', penalty)


def co_tuning(
    objective: Objective,
    *,
    original: Callable[[int], Model],
    num_classes: int,
    stream: str = '',
    weight: float = 2.3,
    temperature: float = 1.0,
    source_classes: int | None = None,
) -> Objective:
    """Co-tuning (You et al. 2020, NeurIPS, "Co-tuning for transfer learning", eq. 2, with the direct relationship).

    loss + weight · mean_i -Σ_s p(y_s | y_t = y_i) log q_s(x_i),   q = softmax of the source head's logits

    p(y_s | y_t = c) is the mean of the start network's predictions softmax(logits / T) over the stream's examples of the
    class c. It is measured once, by the first `refresh`, before the network moves; a class without examples has zeros.
    The source head learns by a rule of the stage, `('source_head/.*', …)`.

    Args:
      objective: gives `features` in `Aux.endpoints`.
      original: from the source's number of classes to its network; given by the experiment.
      num_classes: of the data.
      stream: labelled; the objective's first unless given.
      weight: λ; 2.3 in the paper.
      temperature: T that calibrates the source's network (Guo et al. 2017, arXiv:1706.04599), fitted on the source.
      source_classes: that `config.model.source` tells apart.
    """
    stream = stream or objective.streams[0]
    network = source_network(original, source_classes, 'co_tuning')
    with_head = with_source_head(objective, network, stream)

    def init(key, batch):
        unknown = {'relationship': {'source_given_target': jnp.zeros((num_classes, source_classes))}}
        return {**with_head.init(key, batch), **unknown}

    def penalty(variables, batch, aux, key):
        fields, table = batch[stream], variables['relationship']['source_given_target']
        likely = fields['target'] @ table if 'target' in fields else table[label_of(fields)]  # `mixed` gives targets
        logits = network.classify(variables, endpoint(aux, 'features', 'co_tuning'), train=True, rngs={'dropout': key})
        return weight * soft_cross_entropy(logits, likely), {}

    @jax.jit
    def predict(variables, batch):
        logits = network.apply(variables, inputs_of(batch), train=False)['logits']
        return nn.softmax(logits.astype(jnp.float32) / temperature), label_of(batch), batch['mask']

    def refresh(variables, batches):
        moved = refreshed(objective, variables, batches)
        if np.any(variables['relationship']['source_given_target']):
            return moved
        seen = network_of(variables)
        rows = [predict(seen, batch) for batch in batches(stream)]
        probabilities, labels, mask = (jnp.concatenate(column) for column in zip(*rows, strict=True))
        measured = relationship(probabilities, labels, mask, num_classes)
        return {**moved, 'relationship': {'source_given_target': measured}}

    return added(with_head._replace(init=init, refresh=refresh), 'co_tuning', penalty)


def relationship(
    probabilities: Float[Array, 'examples source'],
    labels: Int[Array, 'examples'],
    mask: Float[Array, 'examples'],
    num_classes: int,
) -> Float[Array, 'target source']:
    """The mean prediction over the examples of each class; zeros for a class that has none."""
    member = nn.one_hot(labels, num_classes) * mask[:, None]
    count = jnp.sum(member, 0)[:, None]
    return jnp.matmul(member.T, probabilities, precision='highest') / jnp.maximum(count, 1)


def soft_cross_entropy(
    logits: Float[Array, 'batch classes'], target: Float[Array, 'batch classes']
) -> Float[Array, '']:
    """mean_i -Σ_c target_ic log softmax(logits_i)_c, in nats."""
    return -jnp.mean(jnp.sum(target * nn.log_softmax(logits.astype(jnp.float32)), -1))


def source_network(original: Callable[[int], Model], source_classes: int | None, name: str) -> Model:
    """The source's network, its head under the name `source_head`."""
    if source_classes is None:
        raise UserError(
            f'config.objective.{name}.source_classes: is not known; give the number of classes that config.model.source tells '
            'apart, such as 1000'
        )
    return recast(original(source_classes), head='source_head')


def with_source_head(objective: Objective, network: Model, stream: str) -> Objective:
    """The objective, its parameters with the source's head among them."""

    def init(key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        variables = objective.init(key, batch)
        head = network.init(key, inputs_of(batch[stream]))['params']['source_head']
        return {**variables, 'params': {**variables['params'], 'source_head': head}}

    return objective._replace(init=init)
