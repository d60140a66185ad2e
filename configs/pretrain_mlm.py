"""The text encoder that the project ships: a small BERT that fills in masked words (Devlin et al. 2018, arXiv:1810.04805).

    python -m experiments.text_corpus runs/text_corpus                     # the texts and a vocabulary of 8192 word pieces
    python launch.py --config=configs/pretrain_mlm.py --workdir=runs/text_encoder
    python -m experiments.ship_encoder runs/text_encoder

Four post-norm blocks of width 128: 1.9 million parameters, 3.8 MB in float16, with the head that fills in. 1.5 million words
of film reviews, captions, news, questions: whatever ../shared/data holds that no evaluation split does; a fiftieth of it is
held out, of SST-2's phrases often with the sentence around it still in training. Each text is a
sequence by itself. What the run gave: tl_jax/pretrained/shipped/text_encoder.json.
"""

import ml_collections

CORPUS = 'runs/text_corpus'
BUCKETS = [16, 32, 64, 128]
MODEL = dict(name='bert_tiny', vocabulary=8192, length=128, segments=2, depth=4, heads=4, pool='mean', mlm_head=True)
SPECIAL = dict(mask_id=4, special=[0, 2, 3])  # [MASK]; [PAD], [CLS], [SEP]


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    del arg
    c = ml_collections.ConfigDict()
    c.name = 'Masked language model of the texts at hand'
    c.model = MODEL
    text = dict(tokenizer=dict(name='pretrained', source=f'{CORPUS}/vocab.txt'), length=BUCKETS[-1], buckets=BUCKETS)
    part = lambda name: dict(spec=f'lines:{CORPUS}/corpus.txt[{name}]', **text)
    c.data = dict(train=part(':98%'), eval=part('98%:'))
    c.objective = dict(name='mlm', vocabulary=MODEL['vocabulary'], **SPECIAL)
    c.batch_size = 64
    c.eval_batch_size = 64
    adam = dict(name='adamw', b2=0.98, lr=dict(name='linear', peak=1e-3, warmup=300))
    c.stages = [
        dict(
            name='mlm',
            steps=6000,
            train=[('.*/kernel|.*/embedding', dict(adam, weight_decay=0.01)), ('.*', adam)],
        )
    ]
    c.clip_norm = 1.0
    c.log_every = 100
    c.eval_every = 1000
    c.checkpoint_every = 250
    c.keep = 1
    return c


def sweep():
    yield '', {}
