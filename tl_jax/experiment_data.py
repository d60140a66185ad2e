"""From `config.data` to opened sources and streams, all checked before any work."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tl_jax import data as data_lib
from tl_jax.config import call, plain
from tl_jax.data.buckets import describe
from tl_jax.errors import UserError, nearest
from tl_jax.pretrained.catalogue import Preprocessing, evaluation_transforms, training_transforms
from tl_jax.pretrained.maps import CATALOGUE
from tl_jax.progress import say


class Data(NamedTuple):
    """The streams and sources of a config.

    Attributes:
      streams: `{name: training stream}`.
      sources: `{name: source}` of the training streams.
      eval: `{split: source}`, evaluated during training; a checkpoint may be selected by them.
      test: `{split: source}`, evaluated once, with the selected checkpoint.
      train_transforms: `{stream: transforms of its examples}`.
      eval_transforms: `{split or stream: transforms of its evaluation batches}`.
      batches: (name of a split or stream, its source) -> padded evaluation batches of this process.
      class_names: of the labels; empty where there are none.
      sample_rate: of Poisson sampling; None where epochs are permutations.
    """

    streams: dict[str, Any]
    sources: dict[str, Any]
    eval: dict[str, Any]
    test: dict[str, Any]
    train_transforms: dict[str, list]
    eval_transforms: dict[str, list]
    batches: Callable
    class_names: tuple[str, ...]
    sample_rate: float | None

    @property
    def splits(self) -> dict[str, Any]:
        """All that is evaluated at the end: `eval`, then `test`."""
        return {**self.eval, **self.test}


def data_from(config: Mapping[str, Any]) -> Data:
    """Opens the data of a resolved config."""
    section = dict(config['data'])
    for field, transforms in (('train_transform', training_transforms), ('eval_transform', evaluation_transforms)):
        if section.get(field) == 'pretrained':
            section[field] = transforms(_preprocessing(config['model'], f'config.data.{field}'))
    return call(
        open_data,
        section,
        'config.data',
        run_seed=config['seed'],
        batch_size=config['batch_size'],
        eval_batch_size=config['eval_batch_size'],
    )


def open_data(
    *,
    train: str | dict,
    eval: str | dict | None = None,
    test: str | dict | None = None,
    train_transform: list | dict = (),
    eval_transform: list | dict = (),
    balance: str | None = None,
    poisson: float | None = None,
    seed: int | None = None,
    run_seed: int,
    batch_size: int,
    eval_batch_size: int,
) -> Data:
    """Opens the sources of a config.

    Args:
      train: a source, which becomes the stream `train`, or `{stream: source}`. A source is `'folder:PATH'` or
        `dict(spec='folder:PATH', shots=5, …)` with the options of `tl_jax.data.open_source`.
      eval: the source of the split `val`, or `{split: source}`.
      test: the source of the split `test`, or `{split: source}`.
      train_transform: of training examples: names or dicts, `tl_jax.data.make_transform`; or `{stream: such a list}`; or
        'pretrained': a random crop, a flip, and the input size and normalisation of `config.model.name`'s checkpoint.
      eval_transform: of evaluation examples; or `{split or stream: such a list}`; or 'pretrained', as for the checkpoint.
      balance: 'class' draws every class of a labelled stream equally often.
      poisson: rate of Poisson sampling: each example joins a step's batch by itself, for differential privacy; then
        `batch_size` is the room for them, and the field `mask` says which rows are taken.
      seed: of the order and the random transforms of the training data; the run's seed unless given.
      run_seed: the run's seed.
      batch_size: examples a step, over all processes.
      eval_batch_size: the same in evaluation.
    """
    seed = run_seed if seed is None else seed
    sources = {
        name: _open(spec, f'config.data.train.{name}', seed) for name, spec in _named_sources(train, 'train').items()
    }
    held_out = {
        field: {
            name: _open(spec, f'config.data.{field}.{name}', seed) for name, spec in _named_sources(given, name).items()
        }
        for field, given, name in (('eval', eval, 'val'), ('test', test, 'test'))
    }
    overlap = held_out['eval'].keys() & held_out['test'].keys()
    if overlap:
        raise UserError(f"config.data.test: the split '{overlap.pop()}' is also in config.data.eval; rename one")
    class_names = _class_names(sources, held_out)
    train_transforms = _transforms(train_transform, sources, 'config.data.train_transform')
    splits = {**sources, **held_out['eval'], **held_out['test']}
    eval_transforms = _transforms(eval_transform, splits, 'config.data.eval_transform')

    def batches(name, source):
        return data_lib.eval_batches(
            source,
            batch_size=eval_batch_size,
            transforms=eval_transforms[name],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    streams = {
        # Two streams of one source must not show the same examples in the same order.
        name: data_lib.train_stream(
            source,
            batch_size=batch_size,
            seed=seed + 7919 * i,
            transforms=train_transforms[name],
            balance=balance if source.labels is not None else None,
            rate=poisson,
        )
        for i, (name, source) in enumerate(sources.items())
    }
    for name, source in sources.items():
        if source.lengths is not None:
            say(f'{name}: {describe(source)}')
    return Data(
        streams,
        sources,
        held_out['eval'],
        held_out['test'],
        train_transforms,
        eval_transforms,
        batches,
        class_names,
        poisson,
    )


def _preprocessing(model: Mapping[str, Any], field: str) -> Preprocessing:
    """Of the checkpoint that the main network is named after, at that network's `image_size` where it states one."""
    name = model.get('name')
    entry = CATALOGUE.get(name)
    if entry is None or entry.preprocessing is None:
        known = [each for each, entry in CATALOGUE.items() if entry.preprocessing]
        raise UserError(
            f"{field}: 'pretrained' is the preprocessing of a catalogued checkpoint of images, and config.model.name is "
            f'{name!r}; {nearest(str(name), known)}'
        )
    return entry.preprocessing._replace(size=model.get('image_size', entry.preprocessing.size))


def _transforms(given: list | Mapping, names: Mapping[str, Any], field: str) -> dict[str, list]:
    """The transforms of each stream or split; a name that a mapping leaves out has none."""
    given = plain(given)
    if not isinstance(given, Mapping):
        _check_transform(given, field)
        return dict.fromkeys(names, given)
    for name, items in given.items():
        if name not in names:
            raise UserError(f'{field}.{name}: there is no such stream or split; {nearest(name, names)}')
        _check_transform(items, f'{field}.{name}')
    return {name: given.get(name, []) for name in names}


def _check_transform(items: list, where: str) -> None:
    try:
        data_lib.make_transform(items)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def _named_sources(given: str | Mapping | None, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    return {name: given} if isinstance(given, str) or 'spec' in given else dict(given)


def _open(given: str | Mapping, where: str, seed: int) -> Any:
    options = {'spec': given} if isinstance(given, str) else dict(given)
    if 'shots' in options:
        options.setdefault('shots_seed', seed)
    try:
        return call(data_lib.open_source, options, where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f'{where}: {error}') from None


def _class_names(sources: Mapping[str, Any], held_out: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The class names that all sources agree on; numbers where none has names, nothing where there are no labels."""
    # Where all streams are unlabelled, the splits that judge the run name the classes.
    every = [*sources.values(), *(source for group in held_out.values() for source in group.values())]
    first = next((s for s in every if s.labels is not None or s.class_names is not None), None)
    if first is None:
        return ()
    names = first.class_names or tuple(str(i) for i in range(data_lib.num_classes(first)))
    for field, group in (('train', sources), *held_out.items()):
        for name, source in group.items():
            where = f'config.data.{field}.{name}'
            if source.class_names is not None and first.class_names is not None and source.class_names != names:
                differ = sorted(set(source.class_names) ^ set(names)) or ['their order']
                raise UserError(f'{where}: its classes differ from the training data’s ({", ".join(differ[:5])})')
            if source.labels is not None and len(source.labels) and source.labels.max() >= len(names):
                raise UserError(f'{where}: label {source.labels.max()} is out of range; there are {len(names)} classes')
    return names
