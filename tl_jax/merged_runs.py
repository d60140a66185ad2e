"""From finished runs to one that merges their networks: measured on held-out data, written as a run of its own."""

import ast
import csv
import inspect
import io
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tl_jax import evaluate as evaluate_lib
from tl_jax import merging, trees
from tl_jax import mesh as mesh_lib
from tl_jax import workdir as workdir_lib
from tl_jax.config import call
from tl_jax.errors import UserError, nearest
from tl_jax.experiment import parameter_count
from tl_jax.experiment_data import Data, data_from
from tl_jax.finished import network, opened
from tl_jax.objectives import inputs_of
from tl_jax.pretrained import save_variables
from tl_jax.selection import Selection, selection_from

# name -> function(start, tuned networks, **fields) -> network; those without `start` need none.
METHODS: Mapping[str, Callable] = {
    'wise_ft': merging.wise_ft,
    'uniform_soup': merging.uniform_soup,
    'greedy_soup': merging.greedy_soup,
    'task_arithmetic': merging.task_arithmetic,
    'ties': merging.ties,
    'dare': merging.dare,
}
STATISTICS_BATCHES = 100  # of the training stream, at most an epoch, for batch norm's statistics


class Candidate(NamedTuple):
    """A network with its score on the held-out split, higher is better, and what it is."""

    name: str
    variables: dict[str, Any]
    score: float


class Judge(NamedTuple):
    """How networks are measured: a module, its data, and which figure counts.

    Attributes:
      module: that all the networks are of.
      data: of the first run's config.
      selection: the figure.
      mesh: where it is computed.
      step: from `create_eval_step`.
    """

    module: Any
    data: Data
    selection: Selection
    mesh: jax.sharding.Mesh
    step: Callable

    def figures(self, variables: Any, splits: Mapping[str, Any]) -> dict[str, float]:
        """`{'<split>/<metric>': value}` of a network."""
        placed, values = mesh_lib.put_everywhere(variables, self.mesh), {}
        for split, source in splits.items():
            found, _ = evaluate_lib.evaluate(self.step, placed, self.data.batches(split, source), self.mesh)
            values |= {f'{split}/{name}': value for name, value in found.items()}
        return values

    def score(self, variables: Any) -> float:
        split = self.selection.field.partition('/')[0]
        return self.selection.score(self.figures(variables, {split: self.data.splits[split]}))

    def settled(self, params: Any, like: Mapping[str, Any]) -> dict[str, Any]:
        """The network of merged parameters, batch norm's statistics measured anew on training batches."""
        if not trees.flatten(like.get('batch_stats', {})):
            return {'params': params}
        stream = next(iter(self.data.streams.values()))
        length = next(iter(self.data.sources.values())).length
        count = min(STATISTICS_BATCHES, -(-length // stream.batch_size))
        inputs = (inputs_of(stream.batch_at(step)) for step in range(count))
        variables = {'params': params, 'batch_stats': like['batch_stats']}
        return {'params': params, 'batch_stats': merging.batch_statistics(self.module.apply, variables, inputs)}


def merge_runs(
    config: Mapping[str, Any], folders: Sequence[Path], start: Path | None, method: str, workdir: Path
) -> dict[str, Any]:
    """Merges the networks of finished runs and writes the directory of the merged one; returns its summary.

    Args:
      config: resolved; of the first run.
      folders: of the runs.
      start: of the run that they began from, for the methods that ask for it.
      method: `name` or `name(field=value)`; a list as value tries each, and the held-out split chooses.
      workdir: new.

    Raises:
      UserError: the method, a run or the data cannot do, in one line.
    """
    began = time.perf_counter()
    name, fields = parsed(method)
    wants_start = 'start' in inspect.signature(METHODS[name]).parameters
    if wants_start and start is None:
        raise UserError(f'--start: {name} wants the run that the others began from, such as --start=runs/probe')
    if start is not None and not wants_start:
        raise UserError(f'--start: {name} has no use for it; leave it out')
    config = {**config, 'name': f'{config["name"] or folders[0]}, {name} of {len(folders)}'}
    workdir_lib.holds_run(workdir, config)
    asked = {'method': method, 'files': [str(folder) for folder in folders], 'start': start and str(start)}
    # The config that is stored is of the first run, and the same for many a merge.
    stored = workdir / 'summary.json'
    if stored.exists() and workdir_lib.read_json(stored).get('merge', {}).get('asked') != asked:
        raise UserError(f'--workdir: {workdir} holds another merge; name another directory or delete it')
    files = {str(folder): opened(folder) for folder in (*folders, *([start] if start else []))}
    loaded = {str(folder): network(folder) for folder in folders}
    networks = {folder: variables for folder, (_, variables) in loaded.items()}
    judge = judge_of(config, loaded[str(folders[0])][0])
    beginning = network(start)[1] if start else None
    merging.check_alike({**networks, **({str(start): beginning} if start else {})})
    _check_cards({folder: about for folder, (_, _, about) in files.items()})
    rows = [Candidate(folder, variables, judge.score(variables)) for folder, variables in networks.items()]
    if start:
        rows.append(Candidate(f'start: {start}', beginning, judge.score(beginning)))
    merged, kept = _merged(judge, name, fields, networks, beginning, rows)
    rows += merged
    best = max(merged, key=lambda row: row.score)
    summary = {
        'name': config['name'],
        'seed': config['seed'],
        'select_by': str(judge.selection),
        'selected_step': 0,
        'steps': 0,
        'metrics': judge.figures(best.variables, judge.data.splits),
        'parameters': {'total': parameter_count(best.variables['params']), 'trainable': [], 'bytes_optimizer': []},
        'merge': {
            'asked': asked,
            'method': best.name,
            'files': list(networks),
            'kept': [list(networks)[i] for i in kept],
            'candidates': {row.name: row.score * judge.selection.sign for row in rows},
        },
        'seconds': time.perf_counter() - began,
        **workdir_lib.environment(),
    }
    if jax.process_index() == 0:
        workdir_lib.claim(workdir, config)
        save_variables(
            workdir / 'model.safetensors', mesh_lib.to_host(best.variables), dict(files[str(folders[0])][1].metadata)
        )
        workdir_lib.write_atomically(workdir / 'candidates.csv', _table(rows, judge.selection))
        workdir_lib.write_json(workdir / 'summary.json', summary)
    return summary


def parsed(method: str) -> tuple[str, dict[str, Any]]:
    """`'ties(density=0.2, scale=[0.5, 1])'` as its name and fields."""
    try:
        tree = ast.parse(method.strip(), mode='eval').body
        called = isinstance(tree, ast.Call)
        fields = {k.arg: ast.literal_eval(k.value) for k in tree.keywords} if called else {}
        name = (tree.func if called else tree).id
        if called and (tree.args or None in fields):
            raise ValueError
    except (SyntaxError, ValueError, TypeError, AttributeError):
        raise UserError(f"--method: {method!r} is no method; write one as in --method='ties(density=0.2)'") from None
    empty = next((field for field, value in fields.items() if value in ([], ())), None)
    if empty:
        raise UserError(f'--method: the list of {empty} is empty; name what to try, as in {empty}=[0.3, 0.5]')
    if name not in METHODS:
        raise UserError(f"--method: there is no '{name}'; {nearest(name, METHODS)}")
    return name, fields


def folders_of(paths: Sequence[str]) -> list[Path]:
    """The run directories that paths name, either themselves or by the file that a finished run leaves."""
    folders = [path.parent if path.name == 'model.safetensors' else path for path in map(Path, paths)]
    absent = next((f for f in folders if not (f / 'model.safetensors').exists()), None)
    if absent:
        raise UserError(f'--files: {absent} holds no model.safetensors; name finished runs')
    return list(dict.fromkeys(folders))


def judge_of(config: Mapping[str, Any], module: Any) -> Judge:
    """What measures networks of a module, on the splits of a config."""
    data = data_from(config)
    by = config['select_by'] if config['select_by'] != 'last' else next(iter(data.eval), None)
    if by is None:
        raise UserError(
            "config.data.eval: there is none to choose by; name a held-out split, as in --config.data.eval='npz:…/train[90%:]'"
        )

    def predict(variables, batch):
        return module.apply(variables, inputs_of(batch), train=False)

    mesh = mesh_lib.mesh_from(config, 'eval_batch_size')
    selection = selection_from(by, list(data.eval), list(data.test))
    return Judge(module, data, selection, mesh, evaluate_lib.create_eval_step(predict))


def _merged(
    judge: Judge,
    name: str,
    fields: Mapping[str, Any],
    networks: Mapping[str, Any],
    start: Mapping[str, Any] | None,
    rows: Sequence[Candidate],
) -> tuple[list[Candidate], Sequence[int]]:
    """The merged networks that a method gives, measured; and which of the runs are in it."""
    params = [variables['params'] for variables in networks.values()]
    like = next(iter(networks.values()))
    if name == 'greedy_soup':
        if fields:
            raise UserError(f'--method: greedy_soup has no fields; leave out {", ".join(fields)}')
        measure = lambda soup: judge.score(judge.settled(soup, like))
        soup, kept = merging.greedy_soup(params, [row.score for row in rows[: len(params)]], measure)
        variables = list(networks.values())[kept[0]] if len(kept) == 1 else judge.settled(soup, like)
        return [Candidate(name, variables, judge.score(variables))], kept
    arguments = (params,) if start is None else (start['params'], params)
    found = []
    for values in itertools.product(*(v if isinstance(v, list | tuple) else [v] for v in fields.values())):
        chosen = dict(zip(fields, values, strict=True))
        variables = judge.settled(call(METHODS[name], chosen, '--method', *arguments), like)
        said = f'{name}({", ".join(f"{k}={v}" for k, v in chosen.items())})' if chosen else name
        found.append(Candidate(said, variables, judge.score(variables)))
    return found, range(len(params))


def _check_cards(about: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs whose files say that they are built otherwise, or name other classes, than the first one's."""
    first, *others = about
    other = next((folder for folder, card in about.items() if not card.get('classification', True)), None)
    if other:
        raise UserError(f'--files: {other} is no classification, whose figures merging chooses by')
    for other, field in itertools.product(others, ('model', 'class_names')):
        if about[other].get(field) != about[first].get(field):
            raise UserError(
                f'--files: {other} has another {field} than {first}; merge runs of one network and one task'
            )


def _table(rows: Sequence[Candidate], selection: Selection) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['candidate', selection.field])
    writer.writerows([row.name, f'{row.score * selection.sign:.6f}'] for row in rows)
    return text.getvalue()
