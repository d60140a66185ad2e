"""Text encoders of transformers: endpoints, sizes, masks, names of old files, and configs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import bert, create_model, deberta
from tl_jax.models.deberta import log_buckets, shifted
from tl_jax.pretrained import maps
from tl_jax.pretrained.account import fill
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.pretrained.tensors import Contents, Tensor
from tl_jax.trees import flatten

TOKENS = np.array([[2, 8, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 7, 6, 9, 5, 3]], np.int32)
SMALL = dict(vocabulary=11, width=12, depth=2, heads=3, mlp_width=20)
# Of transformers' bare models, without a pooler but in BERT.
PARAMETERS = {
    'bert_tiny': 4_385_920,
    'bert_mini': 11_170_560,
    'bert_small': 28_763_648,
    'bert_medium': 41_373_184,
    'bert_base': 109_482_240,
    'bert_large': 335_141_888,
    'bert_base_cased': 108_310_272,
    'roberta_base': 124_055_040,
    'roberta_large': 354_310_144,
    'distilbert_base': 66_362_880,
    'electra_small': 13_483_008,
    'electra_base': 108_891_648,
    'electra_large': 334_092_288,
    'deberta_v3_xsmall': 70_682_112,
    'deberta_v3_small': 141_304_320,
    'deberta_v3_base': 183_831_552,
    'deberta_v3_large': 434_012_160,
}


def refuses(message):
    # JAX adds a paragraph of its own to what is raised while it traces.
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}'))


def randomised(model, inputs):
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype), variables)


def features(model, variables, inputs):
    return np.asarray(jax.jit(model.apply)(variables, inputs)['features'])


@pytest.mark.parametrize('name', [*bert.MODELS, *deberta.MODELS])
def test_endpoints_and_sizes(name):
    model = create_model(name, num_classes=3)
    endpoints, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 8), jnp.int32))
    backbone = model.backbone
    blocks = [f'block{i}' for i in range(1, backbone.depth + 1)]
    assert endpoints.keys() == {'mask', 'embeddings', *blocks, 'features', 'logits'}
    assert all(endpoints[n].shape == (2, 8, backbone.width) for n in ('embeddings', *blocks))
    assert endpoints['features'].shape == (2, backbone.width) and endpoints['logits'].shape == (2, 3)
    leaves = flatten(variables['params']['backbone'])
    assert sum(leaf.size for leaf in leaves.values()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ('name', 'pool'), [('bert_tiny', 'pooler'), ('roberta_base', 'cls'), ('deberta_v3_small', 'mean')]
)
def test_padding_and_masked_tokens_change_nothing(name, pool):
    model = create_model(name, pool=pool, pad_id=0, **SMALL)
    variables = randomised(model, TOKENS)
    plain = features(model, variables, TOKENS)
    np.testing.assert_allclose(features(model, variables, np.pad(TOKENS, ((0, 0), (0, 5)))), plain, atol=2e-5)
    # The same mask, given; RoBERTa counts positions by the tokens, so theirs stay what they were.
    masked = dict(tokens=np.where(TOKENS == 0, 7, TOKENS), mask=TOKENS != 0)
    np.testing.assert_allclose(features(model, variables, masked), plain, atol=2e-5)
    other = features(model, variables, np.where(TOKENS == 8, 4, TOKENS))
    assert (np.abs(other - plain).max(1) > 1e-3).tolist() == [True, False, False]


def test_a_text_of_padding_alone_has_finite_gradients():
    for name in ('bert_tiny', 'roberta_base', 'deberta_v3_small'):
        model = create_model(name, pool='mean', **SMALL)
        blank = np.full((2, 4), model.backbone.pad_id, np.int32)
        variables = randomised(model, blank)
        grads = jax.jit(jax.grad(lambda v, m=model, t=blank: m.apply(v, t)['features'].sum()))(variables)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)), name


def test_roberta_counts_positions_of_real_tokens():
    model = create_model('roberta_base', **SMALL, length=9)
    variables = randomised(model, TOKENS)
    # Padding (1) inside the text takes no position.
    one = model.apply(variables, np.array([[4, 5, 6, 1]], np.int32))['embeddings'][0]
    other = model.apply(variables, np.array([[4, 1, 5, 6]], np.int32))['embeddings'][0]
    np.testing.assert_array_equal(one, other[jnp.array([0, 2, 3, 1])])
    assert variables['params']['backbone']['position']['embedding'].shape == (11, 12)


def test_masked_language_model_shares_the_token_table():
    model = create_model('electra_small', **SMALL, embedding_width=6, mlm_head=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert sorted(flatten(variables['params']['backbone']['mlm'])) == [
        'bias',
        'dense/bias',
        'dense/kernel',
        'norm/bias',
        'norm/scale',
    ]
    assert jax.eval_shape(model.apply, variables, TOKENS)['mlm_logits'].shape == (3, 6, 11)


def test_dropout_acts_in_training_alone():
    for name in ('bert_tiny', 'deberta_v3_small'):
        model = create_model(name, dropout=0.5, **SMALL)
        variables = randomised(model, TOKENS)
        draw = jax.jit(
            lambda key, m=model, v=variables: m.apply(v, TOKENS, train=True, rngs={'dropout': key})['features']
        )
        assert not np.allclose(draw(jax.random.key(0)), draw(jax.random.key(1)))
        assert np.isfinite(features(model, variables, TOKENS)).all()


def test_log_buckets_as_transformers():
    distance = [-600, -511, -300, -200, -129, -128, -1, 0, 1, 128, 129, 130, 200, 300, 511, 512, 600]
    expected = [-270, -255, -207, -169, -129, -128, -1, 0, 1, 128, 129, 130, 169, 207, 255, 256, 270]
    assert log_buckets(np.array(distance), 256, 512).tolist() == expected


@pytest.mark.parametrize('length', [1, 2, 5])
def test_shifted_is_a_gather(length):
    scores = np.random.default_rng(0).standard_normal((2, length, 2 * length - 1))
    i, j = np.mgrid[:length, :length]
    np.testing.assert_array_equal(shifted(jnp.asarray(scores)), scores.astype(np.float32)[:, i, length - 1 - i + j])


def read_back(tensors, name, **fields):
    model = create_model(name, **SMALL, **fields)
    contents = Contents({key: Tensor(value.shape, value.dtype, lambda v=value: v) for key, value in tensors.items()})
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return fill(shapes, contents, backbone=model.backbone)[0]


def exported(name, **fields):
    model = create_model(name, **SMALL, **fields)
    variables = jax.tree.map(np.asarray, randomised(model, TOKENS))
    return variables, foreign_tensors(flatten(variables), maps.name_map('transformers', model.backbone))


def test_names_of_bare_models_and_of_the_first_conversions():
    variables, tensors = exported('bert_tiny')
    assert all(name.startswith('bert.') for name in tensors)
    old = {n.removeprefix('bert.'): t for n, t in tensors.items()}
    for new_name, old_name in (('LayerNorm.weight', 'LayerNorm.gamma'), ('LayerNorm.bias', 'LayerNorm.beta')):
        old = {n.replace(new_name, old_name): t for n, t in old.items()}
    old['embeddings.position_ids'] = np.arange(512)[None]
    jax.tree.map(np.testing.assert_array_equal, read_back(old, 'bert_tiny'), variables)
    variables, tensors = exported('deberta_v3_small')
    bare = {n.removeprefix('deberta.'): t for n, t in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, read_back(bare, 'deberta_v3_small'), variables)


@pytest.mark.parametrize('name', ['bert_tiny', 'roberta_base', 'distilbert_base', 'electra_small'])
def test_parts_that_a_model_lacks_are_left_in_the_file(name):
    _, tensors = exported(name, mlm_head=True, pool='pooler')
    tensors['cls.predictions.decoder.weight'] = tensors['lm_head.decoder.bias'] = np.zeros((11, 12), np.float32)
    plain = read_back(tensors, name, pool='cls')
    assert not {'mlm', 'pooler'} & plain['params']['backbone'].keys()
    assert {'mlm', 'pooler'} < read_back(tensors, name, pool='pooler', mlm_head=True)['params']['backbone'].keys()


def test_fewer_positions_are_the_first():
    variables, tensors = exported('bert_tiny')
    cut = read_back(tensors, 'bert_tiny', length=7)['params']['backbone']['position']['embedding']
    np.testing.assert_array_equal(cut, variables['params']['backbone']['position']['embedding'][:7])
    with refuses('position'):
        read_back(tensors, 'bert_tiny', length=513)


def fields(name, config):
    return maps.family_of(create_model(name).backbone).fields(config)


def test_fields_of_configs():
    config = dict(model_type='bert', hidden_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    found = fields('bert_base', config | dict(hidden_act='gelu_new', architectures=['BertForSequenceClassification']))
    wanted = dict(width=128, depth=2, heads=2, vocabulary=99, activation='gelu_tanh', pool='pooler', length=512)
    assert wanted.items() <= found.items()
    roberta = fields('bert_base', dict(model_type='roberta', max_position_embeddings=514, type_vocab_size=1))
    assert dict(kind='roberta', length=512, segments=1, pad_id=1).items() <= roberta.items() and 'pool' not in roberta
    distilbert = fields('bert_base', dict(model_type='distilbert', dim=24, hidden_dim=40, n_layers=3, n_heads=3))
    assert dict(width=24, mlp_width=40, depth=3, heads=3, segments=0).items() <= distilbert.items()
    electra = fields('bert_base', dict(model_type='electra'))
    assert dict(width=256, embedding_width=128, heads=4).items() <= electra.items()
    assert fields('bert_base', dict(model_type='gpt2')) is fields('deberta_v3_base', config) is None
    for name in ('bert_tiny', 'roberta_base', 'distilbert_base', 'electra_small'):
        kind = name.partition('_')[0]
        create_model(name, **fields(name, dict(model_type=kind)))
    with refuses("hidden_act 'mish' is unknown"):
        fields('bert_base', config | dict(hidden_act='mish'))
    with refuses('only encoders with absolute positions'):
        fields('bert_base', config | dict(position_embedding_type='relative_key'))


def test_fields_of_deberta_configs():
    v3 = dict(
        model_type='deberta-v2',
        hidden_size=384,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd='layer_norm',
        share_att_key=True,
        pos_att_type='p2c|c2p',
        position_biased_input=False,
        max_relative_positions=-1,
        max_position_embeddings=512,
    )
    found = fields('deberta_v3_base', v3)
    assert dict(width=384, buckets=256, max_distance=512, activation='gelu').items() <= found.items()
    create_model('deberta_v3_base', **found)
    with refuses('conv_kernel_size = 3 is not supported for deberta-v2; only 0 is'):
        fields('deberta_v3_base', v3 | dict(conv_kernel_size=3))
    with refuses('pos_att_type'):
        fields('deberta_v3_base', v3 | dict(pos_att_type=['c2p']))


def test_refusals():
    with refuses('model.heads: 5 does not divide the width 12'):
        create_model('bert_tiny', **{**SMALL, 'heads': 5})
    with refuses("model.activation: there is no 'gleu'; did you mean 'gelu'"):
        create_model('deberta_v3_small', activation='gleu', **SMALL)
    with refuses('model.max_distance: 40 leaves nothing beyond the 40 exact'):
        create_model('deberta_v3_small', buckets=80, max_distance=40)
    with refuses('model.length: texts have 6 tokens, and the model is for 5'):
        create_model('bert_tiny', length=5, **SMALL).init(jax.random.key(0), TOKENS)
    model = create_model('bert_tiny', **SMALL)
    with refuses("inputs: a text encoder takes no 'segment'; did you mean 'segments'"):
        model.init(jax.random.key(0), dict(tokens=TOKENS, segment=TOKENS))
    with refuses("inputs: a text encoder needs 'tokens', and got mask"):
        model.init(jax.random.key(0), dict(mask=TOKENS != 0))
    with refuses('inputs: tokens must be integers'):
        model.init(jax.random.key(0), np.zeros((2, 8, 8, 3), np.float32))
    with refuses("leave out 'segments'"):
        create_model('deberta_v3_small', **SMALL).init(jax.random.key(0), dict(tokens=TOKENS, segments=TOKENS))
