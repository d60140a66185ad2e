"""Sentiment of Amazon reviews across products: the shallow DANN of Ganin et al. 2016 (arXiv:1505.07818, table 1, original data).

    python launch.py --config=configs/amazon.py:books,dvd,dann --workdir=runs/amazon/books-dvd
    python -m experiments.run amazon --workdir=runs/amazon        # all twelve pairs, network and DANN

Counts of 5000 uni- and bigrams; 2000 labelled reviews of the source, a tenth of which choose the checkpoint, and 2000
unlabelled ones of the target; judged on the target's test set. One hidden layer of 50 sigmoid units, λ = 0.1, as in the
authors' code, which takes one pair of examples a step at a rate of 0.001; here it is 20 pairs at 20 times that rate, for at
most half the code's 200 passes. experiments/amazon_reverse.py chooses λ by reverse validation instead.
"""

import ml_collections

DOMAINS = ('books', 'dvd', 'electronics', 'kitchen')
ARCHIVE = '../shared/data/amazon_reviews.tar.xz/amazon_reviews_graal/data'
PAIRS = 20  # of a source and a target example, a step


def get_config(arg: str = 'books,dvd,dann') -> ml_collections.ConfigDict:
    source, target, method = arg.split(',')
    table = lambda domain, split: dict(spec=f'svmlight:{ARCHIVE}/{domain}_{split}.svmlight', features=5000)
    labelled = table(source, 'train')
    c = ml_collections.ConfigDict()
    c.name = f'{source} → {target}, {method}'
    c.model = dict(name='mlp', dense=[50], dense_activation='sigmoid')
    c.data = dict(
        train=dict(
            source=dict(labelled, spec=labelled['spec'] + '[:90%]'),
            target=dict(table(target, 'train'), unlabelled=True),
        ),
        eval=dict(source_val=dict(labelled, spec=labelled['spec'] + '[90%:]')),
        test=dict(target=table(target, 'test')),
    )
    c.batch_size = PAIRS
    if method == 'source':
        c.objective = dict(name='supervised', stream='source')
    else:
        discriminator = dict(name='mlp', dense=[], num_classes=1)
        c.objective = dict(name='dann', discriminator=discriminator, weight=0.1, gamma=0.0)
    c.stages = [dict(name=method, epochs=100, train=[('.*', dict(name='sgd', lr=1e-3 * PAIRS))])]
    c.eval_every = 180
    c.log_every = 180
    c.select_by = 'source_val/accuracy'
    c.patience = 30
    c.keep = 1
    return c


def sweep():
    for method in ('source', 'dann'):
        yield f'books,dvd,{method}', {}
