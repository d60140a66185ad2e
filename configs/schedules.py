"""What learns when: every partition and recipe of the library on MNIST → digits, from 300 labelled images.

    python launch.py --config=configs/schedules.py:layerwise_decay --workdir=runs/schedules/layerwise_decay
    python launch.py --config=configs/schedules.py --workdir=runs/schedules --mode=sweep         # all of them, one table

The shipped network, trained on MNIST (configs/mnist.py), meets scikit-learn's embedded digits, of which 30 a class are
labelled. `partition`s say which layers learn, and how fast; `recipe`s cut a run into stages. The tables in
tl_jax/partitions.py and tl_jax/stages.py name them all with their papers; `--dry_run` prints the rules they stand for.
The rates are those of one trial, not of a search; 100 steps and seconds each, on a CPU. Test accuracy with seed 0, selected
on 300 others: 96.3 to 97.9 %, 95.1 for norm_only, which starts from random weights; too close together to rank the methods.
"""

from collections.abc import Iterator

import ml_collections

STEPS = 100
ADAMW = dict(name='adamw', lr=1e-3, weight_decay=0.01)
FAST = dict(ADAMW, lr=1e-2)
COSINE = dict(ADAMW, lr=dict(name='cosine', peak=2e-3, warmup=10))
TRIANGLE = dict(ADAMW, lr=dict(name='slanted_triangular', peak=1e-2))

# What one stage trains: fields of tl_jax.partitions.
PARTITIONS = {
    'all': dict(optimizer=COSINE, decay_vectors=False),
    'head': dict(optimizer=FAST),
    'last_k': dict(optimizer=COSINE, k=1),
    'surgical': dict(optimizer=COSINE, layers=['conv1'], head=FAST),  # another scanner: the first layer
    'layerwise_decay': dict(optimizer=COSINE, decay=0.65, decay_vectors=False),
    'discriminative': dict(optimizer=TRIANGLE, factor=2.6),
    'bias_only': dict(optimizer=FAST),
    'norm_only': dict(optimizer=FAST),
    'adapters': dict(optimizer=FAST, lora_plus=4.0),
}
# What a run trains after what: fields of tl_jax.stages.
RECIPES = {
    'lp_ft': dict(steps=STEPS, probe=FAST, optimizer=dict(ADAMW, lr=3e-4)),
    'head_then_all': dict(steps=STEPS, each=20, optimizer=FAST, scale=0.1),
    'gradual_unfreezing': dict(steps=STEPS, each=20, optimizer=TRIANGLE),
    'chain_thaw': dict(steps=STEPS, optimizer=FAST),
    'auto_freeze': dict(steps=STEPS, intervals=5, optimizer=COSINE),
    'bit_hyperrule': dict(),
}
SAM = {
    'sam': dict(name='sam', rho=0.05),
    'asam': dict(name='sam', rho=0.5, adaptive=True),
}


def get_config(arg: str = 'layerwise_decay') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'MNIST → digits, {arg}'
    c.model = dict(name='convnet', widths=[16, 32, 64], source='shipped:mnist_convnet', fresh=['head/.*'])
    # A digit of MNIST fills 20 of its 28 pixels.
    place = [dict(name='resize', size=[20, 20]), dict(name='pad', padding=4), 'to_float']
    c.data = dict(
        train=dict(spec='sklearn:digits/train', shots=30),
        eval='sklearn:digits/val',
        test='sklearn:digits/test',
        train_transform=place,
        eval_transform=place,
    )
    c.objective = dict(name='supervised')
    c.batch_size = 50
    c.eval_batch_size = 300
    c.eval_every = 25
    c.log_every = 25
    c.select_by = 'val/accuracy'
    c.keep = 1
    if arg in RECIPES:
        c.stages = [dict(recipe=arg, **RECIPES[arg])]
    elif arg in PARTITIONS:
        c.stages = [dict(name=arg, steps=STEPS, train=dict(name=arg, **PARTITIONS[arg]))]
    else:
        c.gradient = SAM[arg]
        c.stages = [dict(name=arg, steps=STEPS, train=dict(name='all', **PARTITIONS['all']))]
    if arg == 'norm_only':  # the shipped network has no norms
        c.model = dict(name='convnet', widths=[16, 32, 64], norm='batch', source=None)
    if arg == 'adapters':
        c.model.update(peft=dict(name='lora', rank=4, targets='backbone/conv[23]'))
    if arg == 'bit_hyperrule':
        bit(c)
    return c


def bit(c: ml_collections.ConfigDict) -> None:
    """What the rule says of the data: below 96² pixels 160, cropped to 128; no mixup below 20,000 examples; 512 a batch.

    For another set ask `tl_jax.stages.bit_rule(num_examples, height, width)`. Here a quarter of the side and of the batch.
    """
    c.batch_size = 128
    finish = ['to_float']
    c.data.train_transform = [dict(name='resize', size=[40, 40]), dict(name='random_crop', size=32), *finish]
    c.data.eval_transform = [dict(name='resize', size=[32, 32]), *finish]


def sweep() -> Iterator[tuple[str, dict]]:
    for arg in (*PARTITIONS, *RECIPES, *SAM):
        yield arg, {'seed': 0}
