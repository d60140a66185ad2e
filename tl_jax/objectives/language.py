"""Objectives of texts: to fill in masked tokens, to tell the next one, to label each, to predict a number."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Array, Bool, Float, Int

from tl_jax.entities import entity_figures
from tl_jax.errors import UserError
from tl_jax.models.generate import real_tokens
from tl_jax.objectives.base import Aux, Model, Objective, forward, inputs_of, label_of

REPLACED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


class Masked(NamedTuple):
    """Texts with tokens hidden, and where and what they are; `count` places a text, of which `real` are taken."""

    tokens: Int[Array, 'batch length']
    places: Int[Array, 'batch count']
    target: Int[Array, 'batch count']
    real: Bool[Array, 'batch count']


def mask_tokens(
    key: Array,
    tokens: Int[Array, 'length'],
    candidate: Bool[Array, 'length'],
    *,
    rate: float,
    mask_id: int,
    vocabulary: int,
) -> Masked:
    """Hides `rate` of a text's candidate tokens, at least one (Devlin et al. 2018, arXiv:1810.04805, sec. 3.1).

    Of the chosen 80 % become `mask_id`, 10 % any token of the vocabulary, and 10 % stay. Returns the fields for one text;
    `count` is the most that a text of this length can have, so that shapes are static.
    """
    choose, act, draw = jax.random.split(key, 3)
    count = max(1, round(rate * tokens.shape[0]))
    wanted = jnp.maximum(1, jnp.round(rate * candidate.sum()).astype(jnp.int32))
    score = jnp.where(candidate, jax.random.uniform(choose, tokens.shape), -1.0)
    _, places = jax.lax.top_k(score, count)
    real = (jnp.arange(count) < wanted) & candidate[places]
    target = tokens[places]
    action = jax.random.uniform(act, (count,))
    other = jax.random.randint(draw, (count,), 0, vocabulary)
    shown = jnp.where(action < REPLACED, mask_id, jnp.where(action < REPLACED + RANDOM, other, target))
    return Masked(tokens.at[places].set(jnp.where(real, shown, target)), places, target, real)


def mlm(
    model: Model,
    *,
    vocabulary: int,
    mask_id: int,
    special: Sequence[int],
    rate: float = 0.15,
    stream: str = 'train',
) -> Objective:
    """Masked language modelling (Devlin et al. 2018, arXiv:1810.04805, sec. 3.1), masks drawn anew each time a text comes.

    loss = − sum over hidden tokens of log softmax(mlm_logits)[token] / their number

    Logits are computed at the hidden places alone. An evaluation hides the same tokens of an example every time. Returns nats
    per hidden token.

    Args:
      model: with endpoint `mlm_logits`, and which takes `masked` among its inputs: BERT's family with `mlm_head=True`.
      vocabulary: number of ids.
      mask_id: of [MASK].
      special: ids that are never hidden: padding, the start and end of texts.
      rate: share of the other tokens that is hidden.
      stream: of texts, `tokens` int32 [B, L].
    """
    if not 0 < rate < 1:
        raise UserError(f'config.objective.rate: is a share of the tokens, in (0, 1), not {rate}')

    def hidden(keys, fields):
        candidate = ~jnp.isin(fields['tokens'], jnp.asarray(special))
        one = lambda key, tokens, ok: mask_tokens(key, tokens, ok, rate=rate, mask_id=mask_id, vocabulary=vocabulary)
        return jax.vmap(one)(keys, fields['tokens'], candidate)

    def inputs(fields, masked):
        given = inputs_of({**fields, 'tokens': masked.tokens})
        given = given if isinstance(given, dict) else {'tokens': given}
        # What is no text is told by the tokens before some of them were replaced by others.
        return {**given, 'masked': masked.places}

    def judged(logits, masked):
        nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), masked.target)
        return jnp.where(masked.real, nats, 0.0), masked.real & (jnp.argmax(logits, -1) == masked.target)

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        draw, dropout = jax.random.split(key)
        fields = batch[stream]
        masked = hidden(jax.random.split(draw, len(fields['tokens'])), fields)
        shown = inputs(fields, masked)
        outputs, collections = forward(model, variables, shown, dropout)
        nats, hits = judged(_logits(outputs, 'mlm_logits', 'mlm_head=True'), masked)
        count = jnp.maximum(masked.real.sum(), 1)
        aux = Aux(
            {'accuracy': hits.sum() / count},
            collections,
            endpoints={**outputs, 'inputs': shown, 'mlm_real': masked.real},
        )
        return nats.sum() / count, aux

    def predict(variables, batch):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(batch['index'])
        masked = hidden(keys, batch)
        outputs = model.apply(variables, inputs(batch, masked), train=False)
        nats, hits = judged(outputs['mlm_logits'], masked)
        return {'nats': nats.sum(1), 'hits': hits.sum(1), 'count': masked.real.sum(1)}

    return Objective(init, loss, predict, figures=token_figures, altered=True, streams=(stream,))


def causal_lm(model: Model, *, pad_id: int | None = None, stream: str = 'train') -> Objective:
    """Language modelling: each token from those before it (Radford et al. 2018, "Improving Language Understanding…", eq. 1).

    loss = − sum over t of log softmax(lm_logits[t])[token t + 1] / their number

    Padding is no target: what `token_mask` says or, where the batch has none, the tokens `pad_id`. A `packed:` window has many
    texts, which see one another. Expects tokens int32 [B, L] and a model with endpoint `lm_logits` [B, L, V] (GPT-2's and
    LLaMA's families). Returns nats per token.

    Args:
      model: that continues texts.
      pad_id: that of `config.model`; given by the experiment.
      stream: of texts.
    """

    def judged(outputs, fields):
        logits, target = _logits(outputs, 'lm_logits', 'lm_head=True')[:, :-1], fields['tokens'][:, 1:]
        real = real_tokens(fields['tokens'], fields.get('token_mask'), pad_id)[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
        hits = jnp.argmax(logits, -1) == target
        return {'nats': jnp.sum(nats * real, 1), 'hits': jnp.sum(hits & real, 1), 'count': jnp.sum(real, 1)}

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        outputs, collections = forward(model, variables, inputs_of(batch[stream]), key)
        sums = {name: jnp.sum(rows) for name, rows in judged(outputs, batch[stream]).items()}
        count = jnp.maximum(sums['count'], 1)
        return sums['nats'] / count, Aux({'accuracy': sums['hits'] / count}, collections, endpoints=outputs)

    def predict(variables, batch):
        return judged(model.apply(variables, inputs_of(batch), train=False), batch)

    return Objective(init, loss, predict, figures=token_figures, streams=(stream,))


def token_figures(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Nats per token, its exponential, and the share of tokens told, from each text's sums `nats`, `hits` and `count`."""
    nats, hits, count = (columns[name].sum(dtype=np.float64) for name in ('nats', 'hits', 'count'))
    return {'loss': nats / count, 'accuracy': hits / count, 'perplexity': math.exp(min(nats / count, 700))}


def token_labelling(
    model: Model, *, num_classes: int, class_names: Sequence[str], stream: str = 'train', layer: str | None = None
) -> Objective:
    """A label for each word, by the head on its first token (Devlin et al. 2018, arXiv:1810.04805, sec. 5.3).

    loss = mean over the labelled tokens of CE(head(layer[token]), label)

    Judged by entities: `f1`, `precision` and `recall` of BIO tags as seqeval counts them, and `accuracy` of words.

    Args:
      model: with endpoints [B, L, D].
      num_classes: of the tags.
      class_names: the tags, such as `B-PER`.
      stream: of sentences, `tokens` int32 [B, L] and `token_label` int32 [B, L], negative where there is none.
      layer: the endpoint; `hidden` or else the last block's unless given.
    """

    def logits_of(variables, outputs, **options):
        tokens = outputs[layer or _last_layer(outputs)]
        return model.classify(variables, tokens, **options).astype(jnp.float32)

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        body, head = jax.random.split(key)
        outputs, collections = forward(model, variables, inputs_of(batch[stream]), body)
        logits = logits_of(variables, outputs, train=True, rngs={'dropout': head})
        label = label_of(batch[stream], 'token_label')
        real, target = label >= 0, jnp.maximum(label, 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        count = jnp.maximum(real.sum(), 1)
        hits = (jnp.argmax(logits, -1) == target) & real
        metrics = {'accuracy': hits.sum() / count}
        return jnp.sum(nats * real) / count, Aux(metrics, collections, endpoints=outputs)

    def predict(variables, batch):
        logits = logits_of(variables, model.apply(variables, inputs_of(batch), train=False))
        nats, label = -jax.nn.log_softmax(logits), label_of(batch, 'token_label')
        mine = jnp.take_along_axis(nats, jnp.maximum(label, 0)[..., None], -1)[..., 0]
        nats = jnp.sum(mine * (label >= 0), 1)
        return {'predicted': jnp.argmax(logits, -1), 'token_label': label, 'nats': nats}

    def figures(columns):
        names, real = np.array(class_names), columns['token_label'] >= 0
        true, ours = (
            [names[row[there]].tolist() for row, there in zip(columns[field], real, strict=True)]
            for field in ('token_label', 'predicted')
        )
        accuracy = np.mean(columns['predicted'][real] == columns['token_label'][real])
        nats = columns['nats'].sum(dtype=np.float64) / real.sum()
        return {'loss': nats, 'accuracy': accuracy, **entity_figures(true, ours)}

    return Objective(init, loss, predict, figures=figures, streams=(stream,))


def regression(model: Model, *, stream: str = 'train') -> Objective:
    """Least squares on a number, such as how alike the texts of a pair are.

    loss = mean_i (logits_i − target_i)²

    Expects its stream: target [B] float, and a head of width 1 (`config.model.num_classes=1`). Judged by `mse`, `pearson` and
    `spearman`, the last with the mean rank for ties.
    """

    def predicted(outputs):
        logits = _logits(outputs, 'logits', 'num_classes=1')
        if logits.shape[-1] != 1:
            raise UserError(f'config.model.num_classes: a number is predicted by a head of 1, not {logits.shape[-1]}')
        return logits[:, 0].astype(jnp.float32)

    def init(key, batch):
        if 'target' not in batch[stream]:
            raise UserError("config.data: regression wants a number of each example; name its column, target='score'")
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        outputs, collections = forward(model, variables, inputs_of(batch[stream]), key)
        value = jnp.mean(jnp.square(predicted(outputs) - batch[stream]['target']))
        return value, Aux({}, collections, endpoints=outputs)

    def predict(variables, batch):
        return {
            'predicted': predicted(model.apply(variables, inputs_of(batch), train=False)),
            'target': label_of(batch, 'target'),
        }

    def figures(columns):
        ours, target = (columns[name].astype(np.float64) for name in ('predicted', 'target'))
        ranks = [scipy.stats.rankdata(values) for values in (ours, target)]
        return {
            'mse': np.mean((ours - target) ** 2),
            'pearson': correlation(ours, target),
            'spearman': correlation(*ranks),
        }

    return Objective(init, loss, predict, figures=figures, streams=(stream,))


def correlation(x: Float[np.ndarray, 'n'], y: Float[np.ndarray, 'n']) -> float:
    """Pearson's r; 0 where one of both does not vary."""
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else 0.0


def _last_layer(outputs: Mapping[str, Array]) -> str:
    """The endpoint of all tokens that is nearest to the output."""
    blocks = sorted((int(name[5:]), name) for name in outputs if name.startswith('block') and name[5:].isdigit())
    if 'hidden' not in outputs and not blocks:
        raise UserError(f'config.objective.layer: name an endpoint of all tokens; there are {", ".join(outputs)}')
    return 'hidden' if 'hidden' in outputs else blocks[-1][1]


def _logits(outputs: dict[str, Array], name: str, field: str) -> Float[Array, '...']:
    if name not in outputs:
        raise UserError(f'config.model: this network gives no {name}; set {field}, or choose one that does')
    return outputs[name]
