"""Every parameter-efficient method: the shipped text encoder at TREC's questions, the shipped digit network at other digits.

    python launch.py --config=configs/peft.py:lora --workdir=runs/peft/lora            # what does a question ask for?
    python launch.py --config=configs/peft.py:digits,lora --workdir=runs/peft/digits,lora
    python launch.py --config=configs/peft.py --workdir=runs/peft --mode=sweep         # all of them, one table

Besides the methods of `tl_jax.peft.ADAPTERS`: `lora_plus` (two learning rates), `qlora` and `lora_int8` (the encoder in four
and eight bits). `digits` has those that change convolutions; `vpt` needs a vision transformer, of which no weights are at
hand, so a small one learns MNIST first, then 500 digits of USPS. Rates are guesses, not tuned. Texts, MNIST and USPS are
read from ../shared/data; the other digits and both networks come with the project.
"""

from collections.abc import Iterator

import ml_collections

DATA = '../shared/data'
QUESTIONS = f'{DATA}/text.tar.xz/trec/data/TREC'
TEXT_MODEL = dict(
    name='bert_tiny',
    vocabulary=8192,
    length=128,
    depth=4,
    heads=4,
    pool='mean',
    dropout=0.1,
    source='shipped:text_encoder',
    ignore=['params/backbone/mlm/.*'],
    fresh=['head/.*'],
)
DIGIT_MODEL = dict(name='convnet', widths=[16, 32, 64], source='shipped:mnist_convnet', fresh=['head/.*'])
VIT = dict(name='vit_tiny_patch16', image_size=28, patch_size=7, width=64, depth=3, heads=4, mlp_width=256)
# The last convolutions: of the first one's single channel there is little to turn or factor.
DEEPER = r'backbone/conv[23]'

# name -> config.model.peft, and the learning rate of the adapters.
WEIGHTS = {
    'lora': (dict(name='lora', rank=8), 2e-3),
    'rslora': (dict(name='rslora', rank=8), 1e-3),
    'dora': (dict(name='dora', rank=8), 2e-3),
    'pissa': (dict(name='pissa', rank=8), 1e-3),
    'olora': (dict(name='olora', rank=8), 1e-3),
    'adalora': (dict(name='adalora', rank=8), 3e-3),
    'vera': (dict(name='vera', rank=256), 1e-2),
    'loha': (dict(name='loha', rank=4), 2e-3),
    'lokr': (dict(name='lokr', rank=8), 3e-3),
    'oft': (dict(name='oft', block=8), 3e-3),
    'fourierft': (dict(name='fourierft', frequencies=500), 3e-2),
    'lora_plus': (dict(name='lora', rank=8), 5e-4),
    'qlora': (dict(name='lora', rank=8), 2e-3),
    'lora_int8': (dict(name='lora', rank=8), 2e-3),
    'ssf': (dict(name='ssf'), 5e-3),
}
ACTIVATIONS = {
    'ia3': (dict(name='ia3'), 1e-2),
    'houlsby': (dict(name='houlsby', width=16), 2e-3),
    'pfeiffer': (dict(name='pfeiffer', width=16), 2e-3),
    'parallel': (dict(name='parallel', width=16), 2e-3),
    'prefix': (dict(name='prefix', tokens=8), 5e-3),
    'prompt': (dict(name='prompt', tokens=8), 1e-2),
    'p_tuning': (dict(name='p_tuning', tokens=8), 2e-3),
}
BASES = {'qlora': dict(name='nf4', double=True), 'lora_int8': dict(name='int8')}


def adamw(peak: float) -> dict:
    return dict(name='adamw', lr=dict(name='linear', peak=peak), weight_decay=0.01)


def rules(method: str, rate: float) -> list:
    head = ('head/.*', adamw(2e-3))
    if method == 'lora_plus':  # arXiv:2402.12354, sec. 4: B at 16 times the rate of A
        return [('adapters/.*/lora_b', adamw(16 * rate)), ('adapters/.*', adamw(rate)), head]
    if method == 'adalora':  # half the ranks are given up between a tenth and six tenths of the run
        return [('adapters/.*', dict(adamw(rate), name='adalora', rank=4, begin=0.1, end=0.6, every=10)), head]
    return [('adapters/.*', adamw(rate)), head]


def get_config(arg: str = 'lora') -> ml_collections.ConfigDict:
    method, on_digits = arg.removeprefix('digits,'), arg.startswith('digits,')
    c = ml_collections.ConfigDict()
    if method == 'vpt':
        vision_transformer(c)
    elif on_digits:
        digits(c, method)
    else:
        questions(c, method)
    if method in BASES:
        c.model.quantize = BASES[method]
    if method == 'adalora':
        c.objective = dict(name='supervised', orthogonal=dict(weight=0.1))
    c.name = f'{"USPS" if method == "vpt" else "digits" if on_digits else "TREC"}, {method}'
    c.select_by = 'val/accuracy'
    c.clip_norm = 1.0
    c.keep = 1
    return c


def questions(c: ml_collections.ConfigDict, method: str) -> None:
    peft, rate = {**WEIGHTS, **ACTIVATIONS}[method]
    text = dict(
        # `city What county is Modesto in ?	LOC`: the finer class stands ahead of the question.
        pattern=r'\S+ (?P<text>.*\S)\s*\t(?P<label>\w+)',
        text='text',
        class_names=['ABBR', 'DESC', 'ENTY', 'HUM', 'LOC', 'NUM'],
        tokenizer=dict(name='pretrained', source='shipped:text_encoder'),
        length=64,
        buckets=[16, 32, 64],
    )
    # Many questions stand twice in these files, and ten of the test set's among them.
    once = dict(unique=True, without=f'{QUESTIONS}/test.txt')
    c.model = dict(TEXT_MODEL, peft=peft)
    c.data = dict(
        train=dict(spec=f'tsv:{QUESTIONS}/{{train,dev}}.txt[:90%]', **text, **once),
        eval=dict(spec=f'tsv:{QUESTIONS}/{{train,dev}}.txt[90%:]', **text, **once),
        test=dict(spec=f'tsv:{QUESTIONS}/test.txt', **text),
    )
    c.batch_size = 32
    c.stages = [dict(name=method, epochs=8, train=rules(method, rate))]
    c.eval_every = 200
    c.log_every = 50


def digits(c: ml_collections.ConfigDict, method: str) -> None:
    peft, rate = WEIGHTS[method]
    c.model = dict(DIGIT_MODEL, peft=peft if method == 'ssf' else dict(peft, targets=DEEPER))
    # A digit of MNIST fills 20 of its 28 pixels.
    place = [dict(name='resize', size=[20, 20]), dict(name='pad', padding=4), 'to_float']
    c.data = dict(
        train=dict(spec='sklearn:digits/train', shots=5),
        eval='sklearn:digits/val',
        test='sklearn:digits/test',
        train_transform=place,
        eval_transform=place,
    )
    c.batch_size = 50
    c.eval_batch_size = 300
    c.stages = [dict(name=method, steps=100, train=rules(method, rate))]
    c.eval_every = 25
    c.log_every = 25


def vision_transformer(c: ml_collections.ConfigDict) -> None:
    c.model = dict(VIT, peft=dict(name='vpt', tokens=8, patch_size=7))
    place = [dict(name='resize', size=[28, 28]), 'to_float']
    c.data = dict(
        train=dict(source=f'npz:{DATA}/mnist.npz/train[:20000]', target=f'npz:{DATA}/usps.npz/train[:500]'),
        eval=f'npz:{DATA}/usps.npz/train[80%:]',
        test=f'npz:{DATA}/usps.npz/test',
        train_transform=dict(source=['to_float'], target=place),
        eval_transform=place,
    )
    c.batch_size = 50
    c.eval_batch_size = 300
    stream = lambda name: dict(name='supervised', stream=name)
    c.stages = [
        dict(name='MNIST', steps=1500, objective=stream('source'), train=[('(backbone|head)/.*', adamw(1e-3))]),
        dict(name='vpt', steps=200, objective=stream('target'), train=rules('vpt', 1e-2)),
    ]
    c.eval_every = 100
    c.log_every = 50


def sweep() -> Iterator[tuple[str, dict]]:
    for method in (*WEIGHTS, *ACTIVATIONS, 'vpt'):
        yield method, {'seed': 0}
    for method in WEIGHTS:
        yield f'digits,{method}', {'seed': 0}
