"""Makes entities_seqeval.json: random tags and what seqeval 1.2.2 says of them (`pip install seqeval`, then run this)."""

import json
from pathlib import Path

import numpy as np
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

TAGS = ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC', 'E-LOC', 'S-PER', 'B-A-B', 'I-A-B']

if __name__ == '__main__':
    rng = np.random.default_rng(0)
    cases = []
    for kinds in (3, 5, len(TAGS), len(TAGS)):
        lengths = rng.integers(1, 12, 8)
        true = [[TAGS[i] for i in rng.integers(0, kinds, n)] for n in lengths]
        ours = [[t if rng.random() < 0.7 else TAGS[rng.integers(kinds)] for t in tags] for tags in true]
        figures = dict(f1=f1_score(true, ours), precision=precision_score(true, ours), recall=recall_score(true, ours))
        cases.append(dict(true=true, predicted=ours, entities=[get_entities(tags) for tags in true], figures=figures))
    Path(__file__).with_name('entities_seqeval.json').write_text(json.dumps(cases) + '\n')
