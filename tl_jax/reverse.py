"""Reverse validation: how good an adaptation is, told without a label of the target."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_jax import workdir as workdir_lib
from tl_jax.errors import UserError
from tl_jax.experiment_data import data_from
from tl_jax.finished import predict, trained


def reverse_config(config: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The run that judges a finished one (Ganin et al. 2016, arXiv:1505.07818, sec. 5.1.5, after Zhong et al. 2010).

    The finished network labels the target's training examples; the same method, started from it, then goes the other way,
    from the target so labelled to the source without its labels. Its accuracy on held-out, labelled examples of the source
    is the reverse validation score of the finished run: high only where the adapted labels carry the source's own classes.

    Args:
      config: of the finished run, resolved: streams `source` and `target`, and the evaluation split `source_val`.
      run: its directory; receives `reverse_labels.npz`.

    Returns:
      the config of the reverse run, whose figure is `source_val/accuracy`.

    Raises:
      UserError: the config has no such streams or split.
    """
    streams, splits = config['data']['train'], config['data'].get('eval')
    if not isinstance(streams, Mapping) or set(streams) != {'source', 'target'}:
        raise UserError('config.data.train: reverse validation needs the streams source and target')
    if not isinstance(splits, Mapping) or 'source_val' not in splits:
        raise UserError(
            'config.data.eval: reverse validation needs the split source_val, labelled examples of the source that train '
            "nothing, such as eval=dict(source_val='npz:…[90%:]')"
        )
    data, path = data_from(config), run / 'reverse_labels.npz'
    labels = predict(trained(run), data.sources['target'], data.eval_transforms['target'])
    workdir_lib.save_predictions(path, labels, data.class_names, data.sources['target'], worst=0)
    source, target = (
        {'spec': streams[name]} if isinstance(streams[name], str) else dict(streams[name])
        for name in ('source', 'target')
    )
    target.pop('unlabelled', None)
    turned = copy.deepcopy(dict(config))
    turned['name'] = f'{config["name"]}, reversed'
    network = {name: value for name, value in config['model'].items() if name not in ('ignore', 'fresh', 'pick')}
    turned['model'] = {**network, 'source': str(run / 'model.safetensors')}
    turned['data'] = {
        **config['data'],
        'train': {'source': {**target, 'labels': str(path)}, 'target': {**source, 'unlabelled': True}},
        'eval': {'source_val': splits['source_val']},
        'test': None,
    }
    for field in ('train_transform', 'eval_transform'):
        given = config['data'].get(field)
        if isinstance(given, Mapping):
            other = {'source': 'target', 'target': 'source'}
            kept = {name: items for name, items in given.items() if name in ('source', 'target', 'source_val')}
            turned['data'][field] = {other.get(name, name): items for name, items in kept.items()}
    # The last state: its score is on the only labels there are, which must not also choose.
    turned['select_by'], turned['patience'], turned['report_before'] = 'last', 0, False
    return turned
