"""The shipped text encoder, tuned on film reviews, teaches an LSTM and convolutions (Tang et al. 2019, arXiv:1903.12136).

    python launch.py --config=configs/distil_text.py:teacher --workdir=runs/distil_text/teacher
    python launch.py --config=configs/distil_text.py:lstm,labels --workdir=runs/distil_text/lstm,labels
    python launch.py --config=configs/distil_text.py:lstm,logits --workdir=runs/distil_text/lstm,logits  # reads the teacher
    python -m experiments.run distil_text --workdir=runs/distil_text                     # all of it, with the table

SST-2: trained on its 67,000 phrases, the checkpoint chosen on the development set, judged on the test set of the copy at hand.
`labels` is the student alone; `logits` the paper's way, squared differences of logits and no labels (its α = 0); `soft` half
the labels and half Hinton's soft targets, τ = 3. `lstm` is the paper's student, a bidirectional LSTM, at 0.6 million parameters
against the teacher's 1.9; `cnn` Kim's convolutions (arXiv:1408.5882) at as many. Adadelta with batches of 50, as in the paper.

Encoders of two blocks learn of the teacher's four as well. `small` has half its width: `tinybert` first takes over states and
scores of attention, then predictions (Jiao et al. 2020, arXiv:1909.10351), `minilm` relations of queries, keys and values, then
labels (Wang et al. 2021, arXiv:2012.15828). `half` begins with every other block of the shipped encoder, and `distilbert` first
fills in words beside it (Sanh et al. 2019, arXiv:1910.01108), on these phrases alone, where the papers have a large corpus.

Tang's figures (SST-2 test accuracy: BERT-large 94.9, student alone 86.7, taught 90.7) are of another teacher, word2vec's
embeddings, widths of 300 and 20 altered copies of every text; none of these is here. Students read the teacher's word pieces.
"""

from collections.abc import Iterator

import ml_collections

SST2 = '../shared/data/text.tar.xz/sst2_agnews/data/SST-2'
TOKENIZER = dict(name='pretrained', source='shipped:text_encoder')
VOCABULARY = 8192
TEACHER = dict(name='bert_tiny', vocabulary=VOCABULARY, length=128, depth=4, heads=4, pool='mean', dropout=0.1)
PRETRAINED = dict(source='shipped:text_encoder', ignore=['params/backbone/mlm/.*'], fresh=['head/.*'])
TAUGHT_BY = dict(TEACHER, source='runs/distil_text/teacher/model.safetensors')
STUDENTS = {
    'lstm': dict(name='text_lstm', vocabulary=VOCABULARY, width=64, hidden=64, dense=[100], dropout=0.2),
    'cnn': dict(name='text_cnn', vocabulary=VOCABULARY, width=64, filters=64, head=dict(name='linear', dropout=0.5)),
}
NARROW = dict(TEACHER, depth=2, width=64, mlp_width=256, projections=True)
HALF = dict(TEACHER, depth=2, source='shipped:text_encoder', pick=[2, 4], fresh=['head/.*'])
# name -> config.objective.distilled without its teacher.
METHODS = {
    'labels': None,
    # The mean over the two logits, times two, is the paper's squared distance (sec. 3.3).
    'logits': dict(terms=[dict(name='hints', layers=['logits'], projection=False, weight=2.0)], label_weight=0.0),
    'soft': dict(terms=[dict(name='soft_targets', temperature=3.0, weight=0.5)], label_weight=0.5),
}


def taught_by(teacher: dict, *terms: dict, **objective) -> dict:
    return dict(name='unsupervised', distilled=dict(teacher=teacher, terms=list(terms), **objective))


BLOCKS = [['block1', 'block2'], ['block2', 'block4']]
STATES = taught_by(
    dict(TAUGHT_BY, projections=True),
    dict(name='hidden_states', layers=['embeddings', *BLOCKS]),
    dict(name='attention_scores', layers=BLOCKS),
)
RELATIONS = taught_by(
    dict(TEACHER, **PRETRAINED, projections=True), dict(name='minilm', layer=['block2', 'block4'], heads=8)
)
WORDS = taught_by(
    dict(TEACHER, source='shipped:text_encoder', mlm_head=True, num_classes=0),
    dict(name='token_targets', temperature=2.0, weight=5.0),
    dict(name='token_cosine', layers=[['block2', 'block4']], weight=1.0),
    label_weight=2.0,
)
MLM = dict(name='mlm', vocabulary=VOCABULARY, mask_id=4, special=[0, 2, 3])
LABELS = dict(name='supervised')
# name -> the model, and the objectives of its stages.
ENCODERS = {
    'small,labels': (NARROW, [LABELS]),
    'small,tinybert': (NARROW, [STATES, taught_by(TAUGHT_BY, dict(name='soft_targets', temperature=1.0))]),
    'small,minilm': (NARROW, [RELATIONS, LABELS]),
    'half,labels': (dict(HALF, ignore=PRETRAINED['ignore']), [LABELS]),
    'half,distilbert': (dict(HALF, mlm_head=True), [dict(WORDS, **MLM), LABELS]),
}


def get_config(arg: str = 'lstm,logits') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'SST-2, {arg}'
    c.data = dict(train=phrases('train'), eval=phrases('dev'), test=phrases('test'))
    adamw = dict(name='adamw', lr=dict(name='slanted_triangular', peak=5e-4), weight_decay=0.01)
    if arg == 'teacher':
        c.model = dict(TEACHER, **PRETRAINED)
        c.batch_size, c.clip_norm = 32, 1.0
        c.stages = [dict(name='teacher', epochs=2, train=[('.*', adamw)])]
    elif arg in ENCODERS:
        c.model, objectives = ENCODERS[arg]
        c.batch_size, c.clip_norm = 32, 1.0
        c.stages = [dict(epochs=2, objective=objective, train=[('.*', adamw)]) for objective in objectives]
    else:
        student, method = arg.split(',')
        c.model = STUDENTS[student]
        if METHODS[method]:
            c.objective = dict(name='supervised', distilled=dict(METHODS[method], teacher=TAUGHT_BY))
        c.batch_size = 50
        c.mesh = dict(data=1)  # 50 is the paper's
        c.stages = [dict(name=method, epochs=5, train=[('.*', dict(name='adadelta', lr=1.0, rho=0.95))])]
    c.eval_every = 300
    c.log_every = 50
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    yield 'teacher', {}
    for student in STUDENTS:
        for method in METHODS:
            yield f'{student},{method}', {}
    for arg in ENCODERS:
        yield arg, {}


def phrases(name: str) -> dict:
    spec = f'tsv:{SST2}/{name}.tsv'
    return dict(spec=spec, text='sentence', tokenizer=TOKENIZER, length=64, buckets=[16, 32, 64])
