"""The digit that the student never saw: mistakes on 3s before and after its bias is raised (Hinton et al. 2015, section 3).

    python -m experiments.run hinton --only='taught without 3s/*' --workdir=runs/hinton
    python -m experiments.omitted_digit runs/hinton/taught-without-3s.800/seed0

Of 10,000 test images the paper's student gets 206 wrong, 133 of them 3s; with 3.5 added to the bias of the 3s, the best on the
test set, 109 and 14. The best bias is found on the test set here, too, as there: it shows what the student knows, and is no
fair test figure. Writes `experiments/results/hinton/omitted_digit.json`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from tl_jax import workdir
from tl_jax.errors import UserError

OMITTED = 3
RESULT = Path(__file__).resolve().parent / 'results' / 'hinton' / 'omitted_digit.json'
PUBLISHED = {'mistakes': 206, 'mistakes_on_3s': 133, 'bias': 3.5, 'mistakes_after': 109, 'mistakes_on_3s_after': 14}


def mistakes(logits: Float[np.ndarray, 'n classes'], label: Int[np.ndarray, 'n'], bias: float = 0.0) -> tuple[int, int]:
    """Of all images and of the omitted digit's, `bias` added to the omitted digit's logit."""
    raised = logits + bias * (np.arange(logits.shape[1]) == OMITTED)
    wrong = raised.argmax(1) != label
    return int(wrong.sum()), int(wrong[label == OMITTED].sum())


def best_bias(logits: Float[np.ndarray, 'n classes'], label: Int[np.ndarray, 'n']) -> float:
    """In tenths up to 10, that of the fewest mistakes."""
    biases = np.arange(101) / 10
    return float(min(biases, key=lambda bias: mistakes(logits, label, bias)))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UserError('name the directory of one run, such as runs/hinton/taught-without-3s.800/seed0')
    file = Path(arguments[0]) / 'predictions' / 'test.npz'
    if not file.is_file():
        raise UserError(f'{file}: is not there; finish the run first')
    with np.load(file, allow_pickle=False) as stored:
        # Logits up to a constant of each row, which no comparison within it sees.
        logits, label = np.log(np.maximum(stored['probabilities'], 1e-30)), stored['label']
    bias = best_bias(logits, label)
    (all_before, own_before), (all_after, own_after) = mistakes(logits, label), mistakes(logits, label, bias)
    ours = dict(zip(PUBLISHED, (all_before, own_before, bias, all_after, own_after), strict=True))
    count = int((label == OMITTED).sum())
    right = {'right_of_3s_after_%': round(100 * (1 - own_after / count), 2)}
    summary = workdir.read_json(Path(arguments[0]) / 'summary.json')
    told = {name: summary.get(name) for name in ('seed', 'commit', 'started', 'device')}
    workdir.write_json(RESULT, {'ours': ours | right, 'published': PUBLISHED, **told})
    print(json.dumps(ours | right))
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
