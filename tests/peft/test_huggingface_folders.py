"""Folders of Hugging Face's `peft`: what their tensors mean in our layout, by torch's formulas; what is refused.

`tests/parity/live_peft.py` compares logits with `peft` itself.
"""

import json
import pickle

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.peft import huggingface
from tl_jax.peft.files import laid_over
from tl_jax.peft.huggingface import load_peft, save_peft
from tl_jax.peft.huggingface_layers import rule_of
from tl_jax.trees import flatten, merge, unflatten

RNG = np.random.default_rng(0)
NETWORKS = {
    'bert': create_model(
        'bert_tiny', num_classes=3, vocabulary=11, length=8, width=8, depth=2, heads=2, mlp_width=12, pool='pooler'
    ),
    'gpt2': create_model('gpt2', num_classes=3, vocabulary=11, length=8, width=8, depth=2, heads=2, mlp_width=12),
    'vit': create_model('vit_tiny_patch16', num_classes=3, image_size=8, patch_size=4, width=8, depth=2, heads=2),
}
QUERY = 'bert.encoder.layer.1.attention.self.query'


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def pair(module, rank=2, rows=8, columns=8):
    """A LoRA's tensors of a linear layer."""
    return {f'{module}.lora_A.weight': draw(rank, rows), f'{module}.lora_B.weight': draw(columns, rank)}


def write(folder, tensors, **config):
    """A folder as `peft` writes it."""
    folder.mkdir(exist_ok=True)
    named = {f'base_model.model.{name}': tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(named, folder / 'adapter_model.safetensors')
    if 'peft_type' not in config or 'LORA' in config['peft_type']:
        config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 3, **config}
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    return str(folder)


def variables(network, seed=0):
    """Random variables of a network."""
    inputs = np.zeros((1, 8, 8, 3), np.float32) if network == 'vit' else np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(NETWORKS[network].init, jax.random.key(0), inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def change(leaves, adapter, site):
    """A B of one module."""
    own = {factor: leaves[f'params/adapters/{adapter}/{site}/lora_{factor}'].astype(float) for factor in 'ab'}
    return own['a'] @ own['b']


@pytest.mark.parametrize(
    'flags', [{}, {'use_rslora': True}, {'use_dora': True}, {'use_dora': True, 'use_rslora': True}]
)
def test_a_linear_layer(flags, tmp_path):
    tensors = pair(QUERY)
    if 'use_dora' in flags:
        tensors[f'{QUERY}.lora_magnitude_vector'] = draw(8)
    read = load_peft(write(tmp_path, tensors, lora_dropout=0.1, **flags), NETWORKS['bert'].backbone)
    (section,) = read.adapters.values()
    site = 'backbone/block2/attention/query'
    assert section['targets'] == site and section['dropout'] == 0.1
    # peft: y = x Wᵀ + s x Aᵀ Bᵀ with s = α / r, or α / √r.
    scale = section['alpha'] / (np.sqrt(section['rank']) if section['name'] == 'rslora' else section['rank'])
    assert scale == pytest.approx(3 / np.sqrt(2) if 'use_rslora' in flags else 1.5)
    assert section['name'] == ('dora' if 'use_dora' in flags else 'rslora' if flags else 'lora')
    a, b = (tensors[f'{QUERY}.lora_{factor}.weight'].astype(float) for factor in 'AB')
    np.testing.assert_allclose(change(read.leaves, 'default', site), (b @ a).T, rtol=1e-6)
    if 'use_dora' in flags:
        magnitude = tensors[f'{QUERY}.lora_magnitude_vector']
        np.testing.assert_array_equal(read.leaves[f'params/adapters/default/{site}/magnitude'], magnitude)


def test_what_holds_three_of_our_layers_is_read_into_each(tmp_path):
    module = 'transformer.h.0.attn.c_attn'
    tensors = pair(module, columns=24)
    read = load_peft(write(tmp_path, tensors, fan_in_fan_out=True), NETWORKS['gpt2'].backbone)
    parts = [change(read.leaves, 'default', f'backbone/block1/attention/{part}') for part in ('query', 'key', 'value')]
    whole = tensors[f'{module}.lora_B.weight'].astype(float) @ tensors[f'{module}.lora_A.weight']
    np.testing.assert_allclose(np.concatenate(parts, 1), whole.T, rtol=1e-6)
    assert read.adapters['default']['targets'] == 'backbone/block1/attention/(key|query|value)'


def test_convolutions_and_embeddings(tmp_path):
    module = 'vit.embeddings.patch_embeddings.projection'
    a, b = draw(2, 3, 4, 4), draw(8, 2, 1, 1)
    tensors = {f'{module}.lora_A.weight': a, f'{module}.lora_B.weight': b}
    read = load_peft(write(tmp_path / 'conv', tensors), NETWORKS['vit'].backbone)
    kernel = change(read.leaves, 'default', 'backbone/stem').reshape(4, 4, 3, 8)
    np.testing.assert_allclose(kernel, np.einsum('rihw,or->hwio', a.astype(float), b[:, :, 0, 0]), rtol=1e-6)
    module = 'bert.embeddings.word_embeddings'
    a, b = draw(2, 11), draw(8, 2)
    tensors = {f'{module}.lora_embedding_A': a, f'{module}.lora_embedding_B': b}
    read = load_peft(write(tmp_path / 'table', tensors), NETWORKS['bert'].backbone)
    np.testing.assert_allclose(change(read.leaves, 'default', 'backbone/token'), a.T.astype(float) @ b.T, rtol=1e-6)


def test_names_of_files_and_of_modules_in_memory(tmp_path):
    """Before version 5 transformers called modules as its files still do."""
    old, new = 'vit.encoder.layer.0.attention.attention.query', 'vit.layers.0.attention.q_proj'
    tensors = pair(old)
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    reads = [load_peft(write(tmp_path, each), NETWORKS['vit'].backbone) for each in (tensors, renamed)]
    assert reads[0].adapters == reads[1].adapters
    jax.tree.map(np.testing.assert_array_equal, reads[0].leaves, reads[1].leaves)


def test_patterns_make_several_adapters(tmp_path):
    dense = 'bert.encoder.layer.0.output.dense'
    tensors = pair(QUERY) | pair(dense, rank=4, rows=12)
    patterns = dict(rank_pattern={'layer.0.output.dense': 4}, alpha_pattern={'^' + dense: 5})
    read = load_peft(write(tmp_path, tensors, **patterns), NETWORKS['bert'].backbone, name='x')
    assert {name: (s['rank'], s['alpha'], s['targets']) for name, s in read.adapters.items()} == {
        'x': (2, 3.0, 'backbone/block2/attention/query'),
        'x_2': (4, 5.0, 'backbone/block1/mlp/dense2'),
    }
    assert 'params/adapters/x_2/backbone/block1/mlp/dense2/lora_a' in read.leaves


def test_whole_modules_and_biases(tmp_path):
    weight, bias, moved = draw(3, 8), draw(3), draw(8)
    tensors = pair(QUERY) | {'classifier.weight': weight, 'classifier.bias': bias, f'{QUERY}.base_layer.bias': moved}
    tensors['classifier.original_module.weight'] = draw(3, 8)
    leaves = load_peft(write(tmp_path, tensors, bias='all'), NETWORKS['bert'].backbone).leaves
    np.testing.assert_array_equal(leaves['params/head/kernel'], weight.T)
    np.testing.assert_array_equal(leaves['params/head/bias'], bias)
    np.testing.assert_array_equal(leaves['params/backbone/block2/attention/query/bias'], moved)


def test_scales(tmp_path):
    key, ff = 'bert.encoder.layer.0.attention.self.key', 'bert.encoder.layer.0.output.dense'
    tensors = {f'{key}.ia3_l': draw(8, 1), f'{ff}.ia3_l': draw(1, 12)}
    read = load_peft(
        write(tmp_path, tensors, peft_type='IA3', feedforward_modules=['output.dense']), NETWORKS['bert'].backbone
    )
    site = 'backbone/block1/mlp/dense2'
    assert read.adapters['default']['hidden'] == site
    np.testing.assert_array_equal(read.leaves[f'params/adapters/default/{site}/ia3'], tensors[f'{ff}.ia3_l'][0])
    leaf = read.leaves['params/adapters/default/backbone/block1/attention/key/ia3']
    np.testing.assert_array_equal(leaf, tensors[f'{key}.ia3_l'][:, 0])


def write_prompt(folder, rows, kind, **config):
    write(folder, {}, peft_type=kind, num_virtual_tokens=len(rows), **config)
    safetensors.numpy.save_file({'prompt_embeddings': rows}, folder / 'adapter_model.safetensors')
    return str(folder)


def test_prefixes_by_block(tmp_path):
    """`past_key_values.view(tokens, 2 · blocks, heads, dim)`: a block's keys, then its values."""
    rows = draw(3, 2 * 2 * 8)
    folder = write_prompt(tmp_path, rows, 'PREFIX_TUNING', num_layers=2, token_dim=8, num_attention_heads=2)
    read = load_peft(folder, NETWORKS['bert'].backbone)
    assert read.adapters == {'default': dict(name='prefix', tokens=3)}
    value = read.leaves['params/adapters/default/backbone/block1/attention/value/prefix']
    np.testing.assert_array_equal(value, rows.reshape(3, 4, 8)[:, 1])
    assert len(read.leaves) == 4


@pytest.mark.parametrize('kind', ['PROMPT_TUNING', 'P_TUNING'])
def test_prompts(kind, tmp_path):
    rows = draw(3, 8)
    read = load_peft(write_prompt(tmp_path, rows, kind), NETWORKS['bert'].backbone)
    assert read.adapters == {'default': dict(name='prompt', tokens=3)}
    np.testing.assert_array_equal(read.leaves['params/adapters/default/backbone/token/prompt'], rows)


def test_out_and_in_again_from_layers_unlike_each_other(tmp_path):
    """Two of the three layers in one of theirs, with A of their own, become one adapter of their joint rank."""
    sections = {'one': dict(name='lora', rank=2, alpha=3.0), 'two': dict(name='lora', rank=3, alpha=2.0)}
    sites = {'one': ('query', 'value'), 'two': ('query',)}
    adapters = {
        name: {
            f'backbone/block1/attention/{site}/{leaf}': draw(*shape)
            for site in sites[name]
            for leaf, shape in (('lora_a', (8, sections[name]['rank'])), ('lora_b', (sections[name]['rank'], 8)))
        }
        for name in sections
    }
    roles = {f'params/adapters/{name}/{path}': leaf for name, own in adapters.items() for path, leaf in own.items()}
    whole = merge(variables('gpt2'), unflatten(roles))
    save_peft(tmp_path / 'out', sections, whole, ['params/head/kernel'], NETWORKS['gpt2'].backbone)
    read = load_peft(str(tmp_path / 'out'), NETWORKS['gpt2'].backbone)
    (section,) = read.adapters.values()
    assert section['rank'] == 7
    for site in ('query', 'key', 'value'):
        path = f'backbone/block1/attention/{site}'
        wanted = sum(
            sections[name]['alpha'] / sections[name]['rank'] * change(roles, name, path)
            for name in sections
            if site in sites[name]
        )
        found = section['alpha'] / section['rank'] * change(read.leaves, 'default', path)
        np.testing.assert_allclose(found, wanted + np.zeros((8, 8)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read.leaves['params/head/kernel'], whole['params']['head']['kernel'])


def test_what_no_folder_can_hold(tmp_path):
    plain, backbone = variables('bert'), NETWORKS['bert'].backbone
    site = 'params/adapters/default/backbone/block1/attention/query'
    whole = merge(plain, unflatten({f'{site}/lora_a': draw(8, 2), f'{site}/lora_b': draw(2, 8)}))
    with pytest.raises(UserError, match="no folder of peft holds a 'vera'"):
        save_peft(tmp_path / 'out', {'default': dict(name='vera')}, whole, [], backbone)
    lora = {'default': dict(name='lora', rank=2)}
    with pytest.raises(UserError, match=r"query.weight' learned beside its adapter; --merge"):
        save_peft(tmp_path / 'out', lora, whole, ['params/backbone/block1/attention/query/kernel'], backbone)
    with pytest.raises(UserError, match='are of several methods'):
        save_peft(tmp_path / 'out', lora | {'b': dict(name='ia3')}, whole, [], backbone)
    convnet = create_model('convnet', num_classes=3, widths=[4])
    with pytest.raises(UserError, match='no library has names for the modules of a ConvNet'):
        save_peft(tmp_path / 'out', lora, whole, [], convnet.backbone)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('step', ['save_tensors', 'write_atomically'])
def test_a_kill_leaves_no_wrong_pair(step, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    backbone, site = NETWORKS['bert'].backbone, 'params/adapters/default/backbone/block1/attention/query'
    whole = merge(variables('bert'), unflatten({f'{site}/lora_a': draw(8, 2), f'{site}/lora_b': draw(2, 8)}))
    save = lambda alpha: save_peft(tmp_path, {'default': dict(name='lora', rank=2, alpha=alpha)}, whole, [], backbone)
    save(3.0)
    monkeypatch.setattr(huggingface, step, killed)
    with pytest.raises(KeyboardInterrupt):
        save(5.0)
    with pytest.raises(UserError, match='it has no adapter_config.json'):
        load_peft(str(tmp_path), backbone)
    monkeypatch.undo()
    save(5.0)
    assert load_peft(str(tmp_path), backbone).adapters['default']['alpha'] == 5.0


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'peft_type': 'LORAX'}, "peft_type 'LORAX' is not known here; did you mean 'LORA'"),
        ({'peft_type': ['LORA']}, 'is not known here'),
        ({'init_lora_weights': 'pissa'}, "'init_lora_weights' is 'pissa'"),
        ({'lora_bias': True}, "'lora_bias' is True, which is not known here"),
        ({'layer_replication': [[0, 2]]}, "'layer_replication' is"),
        ({'r': 3}, 'is of rank 2, and its configuration says 3'),
        ({'r': '2'}, "r of its configuration is '2'"),
        ({'use_dora': True}, 'has a magnitude without use_dora, or none with it'),
        ({'rank_pattern': {'(a+)+$': 2}}, r"rank_pattern has the expression '\(a\+\)\+\$'"),
        ({'alpha_pattern': [2]}, 'alpha_pattern of its configuration is no table'),
    ],
)
def test_refuses_what_it_would_not_compute(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_peft(write(tmp_path, pair(QUERY), **config), NETWORKS['bert'].backbone)


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        (pair('bert.encoder.layer.0.attention.self.quarry'), 'is none of this network; is it the right model'),
        (pair(QUERY) | {'cls.something.weight': draw(2)}, 'is of no module of this network'),
        ({'../../escape.lora_A.weight': draw(2, 8)}, 'is none of this network'),
        ({f'{QUERY}.lora_A.weight': draw(2, 8)}, 'has not the two factors of a LoRA'),
        ({}, 'holds no tensors of an adapter'),
        (pair('transformer.h.0.attn.c_attn', columns=25), 'none of this network'),
    ],
)
def test_refuses_tensors_without_a_place(tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_peft(write(tmp_path, tensors), NETWORKS['bert'].backbone)


def test_shapes_and_values_are_checked_where_the_leaves_are_laid_over(tmp_path):
    plain = variables('bert')
    for weight, message in (
        (draw(4, 8), r'its head/kernel is \[8, 4\], in this network it is \[8, 3\]'),
        (np.full((3, 8), np.nan, np.float32), 'not finite'),
    ):
        folder = write(tmp_path, pair(QUERY) | {'classifier.weight': weight})
        leaves = load_peft(folder, NETWORKS['bert'].backbone).leaves
        head = {path: leaf for path, leaf in leaves.items() if 'head' in path}
        with pytest.raises(UserError, match=message):
            laid_over(plain, head, folder)
    over = laid_over(plain, {'params/head/bias': np.ones(3, np.float32)}, 'x')
    assert (np.asarray(over['params']['head']['bias']) == 1).all()
    assert len(flatten(over)) == len(flatten(plain))


def test_damaged_folders(tmp_path):
    backbone = NETWORKS['bert'].backbone
    with pytest.raises(UserError, match='is no adapter folder'):
        load_peft(str(tmp_path), backbone)
    folder = write(tmp_path / 'a', pair(QUERY))
    config = tmp_path / 'a' / 'adapter_config.json'
    for text, message in (
        ('{"r": 1, "r": 2}', "the name 'r' is there twice"),
        ('[1]', 'no table'),
        ('{"a": ' * 100_000, 'nested too deeply'),
        ('"' + 'x' * 1_000_001 + '"', '1,000,003 bytes'),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=f'a damaged description of an adapter .{message}'):
            load_peft(folder, backbone)
    write(tmp_path / 'a', pair(QUERY))
    (tmp_path / 'a' / 'adapter_model.safetensors').unlink()
    with pytest.raises(UserError, match='without its adapter_model.safetensors'):
        load_peft(folder, backbone)


class Trap:
    def __reduce__(self):
        return open, ('/tmp/tl_jax_trap', 'w')


def test_a_pickle_gets_no_further_than_the_whitelist(tmp_path):
    write(tmp_path, pair(QUERY))
    (tmp_path / 'adapter_model.safetensors').unlink()
    (tmp_path / 'adapter_model.bin').write_bytes(pickle.dumps({'base_model.model.x': Trap()}, 2))
    with pytest.raises(UserError, match='adapter_model.bin'):
        load_peft(str(tmp_path), NETWORKS['bert'].backbone)


def test_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    commit = 40 * 'a'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    (tmp_path / 'models--org--net' / 'snapshots').mkdir(parents=True)
    (tmp_path / 'models--org--net' / 'refs').mkdir()
    (tmp_path / 'models--org--net' / 'refs' / 'main').write_text(commit)
    write(tmp_path / 'models--org--net' / 'snapshots' / commit, pair(QUERY))
    for source in ('hf://org/net', f'hf://org/net@{commit}'):
        assert load_peft(source, NETWORKS['bert'].backbone).adapters['default']['rank'] == 2
    with pytest.raises(UserError, match='write hf://org/repo'):
        load_peft('hf://org/net/../x', NETWORKS['bert'].backbone)


def test_a_rule_of_exactly_these_modules():
    blocks = [f'backbone/block{i}/attention/{part}' for i in (1, 2, 11) for part in ('query', 'key')]
    rule = rule_of([*blocks, 'backbone/block2/mlp/dense1', 'head'])
    assert rule == 'backbone/block(1|2|11)/attention/(key|query)|backbone/block2/mlp/dense1|head'
