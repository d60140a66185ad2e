"""A run: what its stages share, and the figures, predictions and network that it leaves."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax import workdir as workdir_lib
from tl_jax.checkpoint import Checkpoints, Place
from tl_jax.errors import UserError, nearest
from tl_jax.evaluate import evaluate
from tl_jax.experiment import Experiment, bytes_of, parameter_count
from tl_jax.objectives import Objective
from tl_jax.peft import files as peft_files
from tl_jax.peft.base import CONSTANTS, ROLE
from tl_jax.pretrained import save_variables
from tl_jax.report import scores
from tl_jax.selection import Selection
from tl_jax.speed import examples_per_second
from tl_jax.state import Layout, TrainState, variables_of

# The collections of a network; methods keep others beside them.
NETWORK = ('params', 'batch_stats', CONSTANTS)


class Run(NamedTuple):
    """What the stages of a run share."""

    workdir: Path
    experiment: Experiment
    mesh: jax.sharding.Mesh
    layout_of: Callable[[int], Layout]
    selection: Selection
    checkpoints: Checkpoints
    log: workdir_lib.MetricsLog
    eval_step_of: Callable[[Objective], Callable]
    seconds: Callable[[], float]


def exported(objective: Objective, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The adapted network under its own names, without whatever else the method needed."""
    if objective.export:
        variables = objective.export(variables)
    network = {name: variables[name] for name in NETWORK if name in variables}
    if objective.figures:
        return network
    return {c: {role: tree[role] for role in ('backbone', 'head', ROLE) if role in tree} for c, tree in network.items()}


def evaluate_splits(
    run: Run, state: TrainState, objective: Objective, splits: Mapping[str, Any], *, store: str | None = None
) -> dict[str, float]:
    """Returns `{'<split>/<metric>': value}`; `store` names a folder of `predictions/` that receives a classification's."""
    data, values = run.experiment.data, {}
    variables = variables_of(state, averaged=run.experiment.config['ema'] > 0)
    for split, source in splits.items():
        found, predictions = evaluate(
            run.eval_step_of(objective),
            variables,
            data.batches(split, source),
            run.mesh,
            figures=objective.figures,
            predictions=store is not None,
        )
        values |= {f'{split}/{name}': value for name, value in found.items()}
        if predictions is not None and jax.process_index() == 0:
            path = run.workdir / 'predictions' / store / f'{split}.npz'
            workdir_lib.save_predictions(path, predictions, data.class_names, source)
    if run.selection.field.partition('/')[0] in splits and run.selection.field not in values:
        raise UserError(
            f"config.select_by: evaluation gives no '{run.selection.field}'; {nearest(run.selection.field, values)}"
        )
    return values


def final_figures(run: Run, state: TrainState, place: Place, spent: Mapping[str, float]) -> dict[str, Any]:
    """Evaluates the selected state on every split, stores its predictions and the model, and returns the summary."""
    config, stage = run.experiment.config, run.experiment.stages[place.stage]
    metrics = {**evaluate_splits(run, state, stage.objective, run.experiment.data.splits, store=''), **spent}
    network = mesh_lib.to_host(exported(stage.objective, variables_of(state, averaged=config['ema'] > 0)))
    if jax.process_index() == 0:
        leaves, base = peft_files.stored(network, config['model'])
        card = workdir_lib.model_card(run.experiment, stage.objective, peft_files.described(config['model']), base)
        save_variables(run.workdir / 'model.safetensors', leaves, card)
    stages = [run.layout_of(number) for number in range(len(run.experiment.stages))]
    return {
        'name': config['name'],
        'seed': config['seed'],
        'select_by': str(run.selection),
        'selected_step': int(state.step),
        'stages': [
            {'name': s.name, 'steps': s.steps, 'train': dict(run.experiment.rules(n, run.log.records))}
            for n, s in enumerate(run.experiment.stages)
        ],
        'metrics': metrics,
        'parameters': {
            'total': parameter_count(state.params),
            'trainable': [
                parameter_count(trees.split(x.state.params, x.partition.trainable.__contains__)[0]) for x in stages
            ],
            'bytes_optimizer': [bytes_of(x.state.opt_state) for x in stages],
        },
    }


def fixed_figures(run: Run, state: TrainState, place: Place) -> dict[str, Any]:
    """`{'networks': {role: size and speed}}` of the student and of the networks that its objective asks but that never learn.

    Those that tell the student's classes apart are evaluated on every split beside it: their figures are given, their
    predictions stored in `predictions/<role>/`. Speed is that of `logits`, of one batch that lies on the devices.

    Args:
      run: its batches and objectives are those of the inputs, not of what a network said of them before.
      state: the selected one.
      place: its place.
    """
    data, objective = run.experiment.data, run.experiment.stages[place.stage].objective
    if not objective.fixed:
        return {}
    variables = variables_of(state, averaged=run.experiment.config['ema'] > 0)
    own = lambda role: {name: variables[name][role] for name in NETWORK if role in variables.get(name, {})}
    parts = {'student': exported(objective, variables), **{fixed.role: own(fixed.role) for fixed in objective.fixed}}
    size = lambda part: {'parameters': parameter_count(part['params']), 'bytes': bytes_of(part)}
    found = {name: size(part) for name, part in parts.items()}
    split, source = next(iter(data.splits.items()), (None, None))
    if objective.figures or split is None:
        return {'networks': found}
    batch = mesh_lib.put_batch(next(iter(data.batches(split, source))), run.mesh)
    told = logits_of(objective, variables, batch)
    calls = {name: functools.partial(ask, variables, batch) for name, ask in told.items()}
    for name, rate in examples_per_second(calls, len(batch['mask'])).items():
        found[name] |= {'examples_per_second': rate, 'batch': len(batch['mask'])}
    for role in list(told)[1:]:
        judged = objective._replace(predict=lambda v, b, role=role: {'logits': told[role](v, b)})
        found[role]['metrics'] = evaluate_splits(run, state, judged, data.splits, store=role)
        if jax.process_index() == 0:
            found[role]['metrics'] |= agreements(run.workdir / 'predictions', role, data.splits)
    return {'networks': found}


def agreements(folder: Path, role: str, splits: Iterable[str]) -> dict[str, float]:
    """How like a teacher's stored predictions are to the student's (as Stanton et al. 2021, arXiv:2106.05945, measure it).

    `<split>/agreement` is the share of examples of which both name one class; `<split>/kl` the mean of KL(teacher ‖ student)
    in nats.
    """
    values = {}
    for split in splits:
        student, teacher = (np.load(path / f'{split}.npz')['probabilities'] for path in (folder, folder / role))
        values[f'{split}/agreement'] = float(np.mean(student.argmax(1) == teacher.argmax(1)))
        values[f'{split}/kl'] = float(np.mean(scores.divergence(teacher, student)))
    return values


def logits_of(objective: Objective, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Callable]:
    """`{role: (variables, batch) -> logits}` of the student and of the fixed networks that tell its classes apart."""
    asked = {'student': objective.predict, **{fixed.role: fixed.endpoints for fixed in objective.fixed}}
    shapes = {name: jax.eval_shape(ask, variables, batch).get('logits') for name, ask in asked.items()}
    alike = [name for name, shape in shapes.items() if shape is not None and shape.shape == shapes['student'].shape]
    return {name: jax.jit(lambda v, b, ask=asked[name]: ask(v, b)['logits']) for name in alike}
