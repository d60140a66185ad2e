"""Terms of text encoders, token by token; padding counts in none, neither as a token nor as what a token looks at.

Both networks see the same tokens, so that lengths agree. Values are means over the tokens of a batch: a text's number is its
tokens' sum, scaled so that the mean over texts is the mean over tokens.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import unit
from tl_jax.objectives.distillation.base import Pair, Term, comparing
from tl_jax.objectives.distillation.layers import (
    FIELD,
    Layer,
    Layers,
    at_least_float32,
    layer_pair,
    layer_pairs,
    reads,
    require_same_channels,
)
from tl_jax.objectives.distillation.logits import check_temperature, divergence
from tl_jax.objectives.distillation.projectors import dense, dense_init

RELATIONS = {'q': 'query', 'k': 'key', 'v': 'value'}
Names = Sequence[tuple[str, str]]


def token_targets(*, temperature: float = 2.0, student: str = 'mlm_logits', teacher: str = 'mlm_logits') -> Term:
    """τ² KL(softmax(t / τ) ‖ softmax(s / τ)) at each token, nats (DistilBERT: Sanh et al. 2019, arXiv:1910.01108, sec. 2).

    With the objective `mlm` at the hidden tokens (the authors' `restrict_ce_to_mask`), else at all. Their weights: 5 of this, 2
    of the masked language model, 1 of `token_cosine`.

    Args:
      temperature: τ; 2 in the authors' code.
      student: its endpoint [B, L, V], or [B, hidden tokens, V].
      teacher: the same of the teacher.
    """
    check_temperature(temperature)

    def init(key, pair: Pair):
        mine, theirs = pair.student[student].shape, pair.teacher[teacher].shape
        if mine != theirs:
            raise UserError(
                f"{FIELD}: token_targets compares the student's '{student}' {list(mine)} with the teacher's '{teacher}' "
                f'{list(theirs)}; both must tell the same tokens of one vocabulary'
            )
        if predicted(pair).shape != mine[:2]:
            raise UserError(
                f"{FIELD}: token_targets knows no padding of '{student}' {list(mine)}; name logits of tokens"
            )
        return {}

    def compare(pair):
        s, t = (at_least_float32(x) / temperature for x in (pair.student[student], pair.teacher[teacher]))
        return temperature**2 * over_tokens(divergence(t, s), predicted(pair))

    return comparing(compare, student=(student, 'mask'), teacher=(teacher,), init=init)


def token_cosine(*, layers: Layers) -> Term:
    """Σ_layers 1 - cos(s, t) of each token (DistilBERT: Sanh et al. 2019, arXiv:1910.01108, sec. 2, the last block).

    Args:
      layers: endpoints [B, L, D] of one width, such as [['block6', 'block12']].
    """
    names = layer_pairs(layers)

    def init(key, pair: Pair):
        require_tokens('token_cosine', pair, names)
        require_same_channels('token_cosine', pair, names)
        return {}

    def compare(pair):
        far = lambda s, t: 1 - jnp.sum(unit(pair.student[s]) * unit(pair.teacher[t]), -1)
        return over_tokens(sum(far(*pair_of_names) for pair_of_names in names), pair.student['mask'])

    return comparing(compare, init=init, **with_mask(names))


def hidden_states(*, layers: Layers, projection: bool = True) -> Term:
    """Σ_layers mean over tokens and channels of (s W - t)² (TinyBERT: Jiao et al. 2020, arXiv:1909.10351, eq. 8 and 9).

    All layers of a term share W [student's width, teacher's]. As in the paper the embeddings have theirs where they are a term
    of their own, `layers=['embeddings']`; the authors' code shares one, and has a bias. Its first stage is this and
    `attention_scores` with `label_weight=0`, the second `soft_targets` with τ = 1.

    Args:
      layers: endpoints [B, L, D]; block m of the student with block g(m) = 3 m of the teacher, in the paper.
      projection: whether there is a W; without one the widths must be equal.
    """
    names = layer_pairs(layers)

    def init(key, pair: Pair):
        require_tokens('hidden_states', pair, names)
        if not projection:
            require_same_channels('hidden_states without a projection', pair, names)
            return {}
        widths = {(pair.student[s].shape[-1], pair.teacher[t].shape[-1]) for s, t in names}
        if len(widths) > 1:
            raise UserError(
                f'{FIELD}: hidden_states has one projection, and its layers differ in width, '
                f'{" and ".join(f"{s} to {t}" for s, t in sorted(widths))}; make them several terms'
            )
        return dense_init(key, *widths.pop(), bias=False)

    def loss(params, state, pair, key):
        value = 0.0
        for student, teacher in names:
            s, t = at_least_float32(pair.student[student]), at_least_float32(pair.teacher[teacher])
            s = dense(params, s) if projection else s
            value += jnp.mean(jnp.square(s - t), -1)
        return over_tokens(value, pair.student['mask']), state

    return Term(loss, init=init, **with_mask(names))


def attention_scores(*, layers: Layers) -> Term:
    """Σ_layers mean over heads, tokens and the tokens they look at of (A_s - A_t)² (TinyBERT, arXiv:1909.10351, eq. 7).

    A = Q Kᵀ / √d, ahead of the softmax: the paper's "unnormalised attention matrix". Both networks have as many heads, and show
    what it is made of: `config.model.projections=True` of the encoders of BERT's family, student and teacher.

    Args:
      layers: blocks, such as [['block1', 'block3'], ['block2', 'block6']].
    """
    names = layer_pairs(layers)
    parts = parts_of(names, ('query', 'key'))

    def init(key, pair: Pair):
        require_tokens('attention_scores', pair, parts)
        require_same_heads('attention_scores', pair, parts)
        return {}

    def compare(pair):
        real, value = pair.student['mask'], 0.0
        count = jnp.maximum(jnp.sum(real, 1), 1)[:, None]
        for student, teacher in names:
            s, t = scores(pair.student, student, 'qk'), scores(pair.teacher, teacher, 'qk')
            squares = jnp.where(real[:, None, None, :], jnp.square(s - t), 0)
            value += jnp.mean(jnp.sum(squares, -1), 1) / count
        return over_tokens(value, real)

    return comparing(compare, init=init, **with_mask(parts))


def minilm(*, layer: Layer, relations: Sequence[str] = ('qq', 'kk', 'vv'), heads: int = 0) -> Term:
    """Σ_relations mean over heads and tokens of KL(R_t ‖ R_s), R = softmax(X Yᵀ / √d) over the text's tokens, nats.

    Version 2 (Wang et al. 2021, arXiv:2012.15828, sec. 3) by default: queries with queries, keys, values, in relation heads
    of d = width / heads, so that neither widths nor heads need agree; 48 for the paper's teachers of width 768. Version 1 (Wang
    et al. 2020, arXiv:2002.10957, sec. 3) is `relations=['qk', 'vv']`: attention and
    values of the last block. The networks show them with `config.model.projections=True`.

    Args:
      layer: the block, or [the student's, the teacher's].
      relations: pairs of 'q', 'k' and 'v'.
      heads: relation heads; 0 for the networks' own, which must then be as many.
    """
    unknown = next((r for r in relations if len(r) != 2 or not set(r) <= set(RELATIONS)), None)
    if unknown is not None or isinstance(relations, str) or not relations:
        raise UserError(f"{FIELD}: minilm.relations is a list of pairs such as 'qk' and 'vv', not {relations!r}")
    if heads < 0:
        raise UserError(f'{FIELD}: minilm.heads must be a count, or 0 for those of the networks, not {heads}')
    names = layer_pair(layer)
    parts = parts_of([names], dict.fromkeys(RELATIONS[letter] for r in relations for letter in r))

    def init(key, pair: Pair):
        require_tokens('minilm', pair, parts)
        if not heads:
            require_same_heads('minilm without `heads`', pair, parts)
        for who, found, name in (('student', pair.student, parts[0][0]), ('teacher', pair.teacher, parts[0][1])):
            width = found[name].shape[2] * found[name].shape[3]
            if heads and width % heads:
                raise UserError(
                    f"{FIELD}: minilm.heads: {heads} do not divide the {who}'s width {width}; take a divisor"
                )
        return {}

    def compare(pair):
        real, value = pair.student['mask'], 0.0
        lowest = jnp.finfo(jnp.float32).min
        for relation in relations:
            s, t = (
                jnp.where(real[:, None, None, :], scores(found, name, relation, heads), lowest)
                for found, name in zip((pair.student, pair.teacher), names, strict=True)
            )
            value += jnp.mean(divergence(t, s), 1)
        return over_tokens(value, real)

    return comparing(compare, init=init, **with_mask(parts))


def scores(endpoints, block: str, relation: str, heads: int = 0) -> Float[Array, 'batch heads tokens tokens']:
    """X Yᵀ / √d of each head, X and Y a block's queries, keys or values, in other heads than the network's where asked for."""
    x, y = (at_least_float32(endpoints[f'{block}_{RELATIONS[letter]}']) for letter in relation)
    if heads:
        x, y = (z.reshape(*z.shape[:2], heads, -1) for z in (x, y))
    return jnp.einsum('bqhd,bkhd->bhqk', x, y) * x.shape[-1] ** -0.5


def predicted(pair: Pair) -> Bool[Array, 'batch tokens']:
    """The tokens whose predictions count: those that a masked language model has hidden, else all that are no padding."""
    return pair.student['mlm_real'] if 'mlm_real' in pair.student else pair.student['mask']


def over_tokens(values: Float[Array, 'batch tokens'], real: Bool[Array, 'batch tokens']) -> Float[Array, 'batch']:
    """A number for each text whose mean over the batch is that over its tokens."""
    return jnp.sum(jnp.where(real, values, 0), 1) * (len(values) / jnp.maximum(jnp.sum(real), 1))


def parts_of(names: Names, parts) -> tuple[tuple[str, str], ...]:
    """The endpoints of blocks that hold their queries, keys or values."""
    return tuple((f'{student}_{part}', f'{teacher}_{part}') for student, teacher in names for part in parts)


def with_mask(names: Names) -> dict[str, tuple[str, ...]]:
    """What a term reads, with the student's `mask`."""
    read = reads(names)
    return {**read, 'student': (*read['student'], 'mask')}


def require_tokens(term: str, pair: Pair, names: Names) -> None:
    """Refuses endpoints that have not one row for each token of the text."""
    wanted = pair.student['mask'].shape
    for who, found, own in zip(
        ('student', 'teacher'), (pair.student, pair.teacher), zip(*names, strict=True), strict=True
    ):
        for name in own:
            shape = found[name].shape
            if len(shape) < 3 or shape[:2] != wanted:
                raise UserError(
                    f"{FIELD}: {term} compares tokens, {list(wanted)} of them, and the {who}'s '{name}' is {list(shape)}; name "
                    'a block of a text encoder'
                )


def require_same_heads(term: str, pair: Pair, names: Names) -> None:
    """Refuses blocks of different numbers of heads."""
    for student, teacher in names:
        s, t = pair.student[student].shape[2], pair.teacher[teacher].shape[2]
        if s != t:
            raise UserError(
                f"{FIELD}: {term} compares head with head, and the student's '{student}' has {s}, the teacher's '{teacher}' "
                f'{t}; give both networks as many, or use minilm with `heads`'
            )
