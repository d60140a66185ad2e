"""Every parameter-efficient method: the shipped text encoder at TREC's questions, the shipped digit network at other digits.

    python launch.py --config=configs/peft.py:lora --workdir=runs/peft/lora            # what does a question ask for?
    python launch.py --config=configs/peft.py:digits,lora --workdir=runs/peft/digits,lora
    python launch.py --config=configs/peft.py:mnist,vit --workdir=runs/peft/mnist,vit/seed0        # what usps,vpt starts from
    python launch.py --config=configs/peft.py --workdir=runs/peft --mode=sweep         # all of them, one table

Besides the methods of `tl_jax.peft.ADAPTERS`: `lora_plus` (two learning rates), `qlora` and `lora_int8` (the encoder in four
and eight bits), `lora_embedding` (LoRA on the table of words, too). `digits` has those that change convolutions. Prompts among
patches need a vision transformer, of which no weights are at hand: `mnist,vit` makes a small one, which `usps,vpt`,
`usps,vpt_shallow` and, beside them, `usps,probe` and `usps,full` take to 500 digits of USPS. Rates are guesses, not tuned;
`houlsby` leaves the norms frozen, which its paper trains. Texts, MNIST and USPS are read from ../shared/data; the other digits
and both networks come with the project.
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
WORDS_TOO = {'lora_embedding': (dict(name='lora', rank=8, targets='backbone/token|.*/(query|value)'), 2e-3)}
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


# name -> config.model.peft, where there is one, and what learns.
PROMPTS = dict(name='vpt', tokens=8, patch_size=7)
TRANSFORMER = {
    'probe': (None, [('head/.*', adamw(1e-2))]),
    'full': (None, [('.*', adamw(1e-3))]),
    'vpt_shallow': (dict(PROMPTS, deep=False), rules('vpt', 1e-2)),
    'vpt': (PROMPTS, rules('vpt', 1e-2)),
}


def get_config(arg: str = 'lora') -> ml_collections.ConfigDict:
    data, _, method = arg.rpartition(',')
    c = ml_collections.ConfigDict()
    {'': questions, 'digits': digits, 'mnist': mnist, 'usps': usps}[data](c, method)
    if method in BASES:
        c.model.quantize = BASES[method]
    if method == 'adalora':
        c.objective = dict(name='supervised', orthogonal=dict(weight=0.1))
    c.name = f'{data or "TREC"}, {method}'
    c.select_by = 'val/accuracy'
    c.clip_norm = 1.0
    c.keep = 1
    return c


def questions(c: ml_collections.ConfigDict, method: str) -> None:
    peft, rate = {**WEIGHTS, **WORDS_TOO, **ACTIVATIONS}[method]
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


def mnist(c: ml_collections.ConfigDict, method: str) -> None:
    c.model = dict(VIT)
    images = f'npz:{DATA}/mnist.npz'
    handwriting(c, f'{images}/train[:20000]', f'{images}/train[90%:]', f'{images}/test', ['to_float'])
    c.stages = [dict(name=method, steps=1500, train=[('.*', adamw(1e-3))])]


def usps(c: ml_collections.ConfigDict, method: str) -> None:
    peft, train = TRANSFORMER[method]
    c.model = dict(VIT, source='runs/peft/mnist,vit/seed0/model.safetensors', fresh=['head/.*'])
    if peft:
        c.model.peft = peft
    place = [dict(name='resize', size=[28, 28]), 'to_float']
    images = f'npz:{DATA}/usps.npz'
    handwriting(c, f'{images}/train[:500]', f'{images}/train[80%:]', f'{images}/test', place)
    c.stages = [dict(name=method, steps=200, train=train)]


def handwriting(c: ml_collections.ConfigDict, train: str, rest: str, test: str, transform: list) -> None:
    c.data = dict(train=train, eval=rest, test=test, train_transform=transform, eval_transform=transform)
    c.batch_size = 50
    c.eval_batch_size = 300
    c.eval_every = 100
    c.log_every = 50


def sweep() -> Iterator[tuple[str, dict]]:
    for method in (*WEIGHTS, *WORDS_TOO, *ACTIVATIONS):
        yield method, {'seed': 0}
    for method in WEIGHTS:
        yield f'digits,{method}', {'seed': 0}
    yield 'mnist,vit', {'seed': 0}
    for method in TRANSFORMER:
        yield f'usps,{method}', {'seed': 0}
