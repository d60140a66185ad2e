"""Deep mutual learning: networks that learn together, each from the labels and from what the others predict."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import Aux, Model, Models, Objective, Phase, forward, inputs_of, role
from tl_jax.objectives.distillation.logits import check_temperature, divergence
from tl_jax.objectives.supervised import supervised


def mutual(
    model: Model,
    *,
    peers: Models,
    num_classes: int,
    stream: str = 'train',
    weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    order: Literal['in_turn', 'together'] = 'in_turn',
) -> Objective:
    """Deep mutual learning (Zhang et al. 2018, arXiv:1706.00384, eq. 8) of a cohort of K networks.

    loss_k = CE(z_k, y) + weight · τ² / (K - 1) · Σ_{l ≠ k} KL(softmax(z_l / τ) ‖ softmax(z_k / τ))

    No gradient enters z_l. All predictions are those of training mode, as in algorithm 1; a network's running statistics
    move once a step, in its own pass.

    Roles: `backbone` and `head` are the first network, `peer`, `peer2`, … the others. They start from keys of their own.
    `predict` and the stored network are the first's; each accuracy is logged.

    Args:
      model: the first network.
      peers: the others, a section as `config.model` each.
      num_classes: of the data.
      stream: image [B, H, W, C] and label [B] int (or target [B, C] of mixed images).
      weight: of the divergence; 1 in the paper.
      temperature: τ; 1 in the paper.
      label_smoothing: of the cross-entropy.
      order: 'in_turn' is algorithm 1: each network is updated before the next one asks for its predictions, at K passes
        more for each; 'together' takes one pass of each, and all updates from it.

    Returns nats per example: of one network in its phase, summed over networks where they learn together.
    """
    check_temperature(temperature, 'config.objective')
    if not peers:
        raise UserError(
            'config.objective.peers: is empty; give a network to learn with, such as the fields of config.model'
        )
    names = [f'peer{k}' if k > 1 else 'peer' for k in range(1, len(peers) + 1)]
    cohort = [model, *(role(name, peer) for name, peer in zip(names, peers, strict=True))]
    rules = [r'(backbone|head)/.*', *(f'{name}/.*' for name in names)]
    learners = [
        supervised(network, num_classes=num_classes, stream=stream, label_smoothing=label_smoothing)
        for network in cohort
    ]

    def init(key, batch):
        keys = jax.random.split(key, len(cohort))
        return trees.merge(*(learner.init(k, batch) for learner, k in zip(learners, keys, strict=True)))

    def lesson(own: Any, others: list[Any]) -> Any:
        """The mean over the batch and the others of what one network learns from them."""
        widths = sorted({logits.shape[-1] for logits in (own, *others)})
        if len(widths) > 1:
            raise UserError(f'config.objective.peers: tell {widths} classes apart; leave out num_classes of them')
        softened = [logits.astype(jnp.float32) / temperature for logits in (own, *others)]
        apart = sum(jnp.mean(divergence(lax.stop_gradient(target), softened[0])) for target in softened[1:])
        return temperature**2 * apart / len(others)

    def turn(number):
        def loss(variables, batch, key):
            keys = jax.random.split(key, len(cohort))
            others = [
                forward(network, variables, inputs_of(batch[stream]), keys[k])[0]['logits']
                for k, network in enumerate(cohort)
                if k != number
            ]
            value, aux = learners[number].loss(variables, batch, keys[number])
            learnt = lesson(aux.endpoints['logits'], others)
            return value + weight * learnt, aux._replace(metrics={**aux.metrics, 'mutual': learnt})

        return loss

    def together(variables, batch, key):
        keys = jax.random.split(key, len(cohort))
        values, auxes = zip(*(o.loss(variables, batch, k) for o, k in zip(learners, keys, strict=True)), strict=True)
        logits = [aux.endpoints['logits'] for aux in auxes]
        learnt = [lesson(own, logits[:k] + logits[k + 1 :]) for k, own in enumerate(logits)]
        metrics = {f'accuracy/{name}': aux.metrics['accuracy'] for name, aux in zip(names, auxes[1:], strict=True)}
        # The first network hands back the peers' statistics as it found them.
        moved = trees.merge(*(aux.collections for aux in auxes))
        metrics |= {**auxes[0].metrics, 'mutual': sum(learnt) / len(learnt)}
        return sum(values) + weight * sum(learnt), Aux(metrics, moved, endpoints=auxes[0].endpoints)

    if order == 'together':
        return Objective(init, together, learners[0].predict, streams=(stream,))
    turns = [Phase(name, turn(k), rule) for k, (name, rule) in enumerate(zip(['first', *names], rules, strict=True))]
    return Objective(init, turns[0].loss, learners[0].predict, tuple(turns), streams=(stream,))
