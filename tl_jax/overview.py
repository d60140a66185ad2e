"""What a config would train, before it does: parameters by partition, bytes, memory, and whether the data are there."""

from collections.abc import Mapping
from typing import Any

import jax

from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.experiment import Experiment, Stage, build, bytes_of, parameter_count
from tl_jax.objectives import Objective, phases_of
from tl_jax.state import Layout
from tl_jax.step import layouts, progress


def describe(config: Mapping[str, Any]) -> str:
    """Returns the dry run's text for a resolved config; reads the data's index, but no weights, and trains nothing."""
    mesh = mesh_lib.mesh_from(config, 'batch_size', 'eval_batch_size')
    experiment = build(config)
    layout_of = layouts(experiment, mesh)
    stages = [layout_of(number) for number in range(len(experiment.stages))]
    lines = [*_data(experiment), '', *_parameters(experiment, stages)]
    for number, (stage, layout) in enumerate(zip(experiment.stages, stages, strict=True)):
        lines += ['', *_memory(experiment, stage, layout), *_rules(experiment, number)]
    return '\n'.join([*lines, '', f'mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}'])


def _data(experiment: Experiment) -> list[str]:
    data = experiment.data
    groups = (('train', data.sources), ('eval', data.eval), ('test', data.test))
    return [
        f'{field:6} {name:10} {source.length:>9,} examples  {source.name}'
        for field, sources in groups
        for name, source in sources.items()
    ] + [f'classes ({len(data.class_names)}): {", ".join(data.class_names[:12])}']


def _parameters(experiment: Experiment, stages: list[Layout]) -> list[str]:
    """One row a leaf: path, shape, dtype, bytes, and the rule that trains it in each stage."""
    flat = trees.flatten(trees.merge(*(stage.state.params for stage in stages)))
    columns = []
    for number in range(len(stages)):
        rules = [(regex, 'frozen' if spec is None else f'{spec["name"]}') for regex, spec in experiment.rules(number)]
        there = trees.flatten(stages[number].state.params)
        said = trees.match(rules, there, field=f'config.stages[{number}].train', default='frozen')
        columns.append({path: said.get(path, 'absent') for path in flat})
    width = max(map(len, flat))
    header = f'{"parameter":{width}}  {"shape":>18}  {"dtype":>8}  {"kB":>9}  ' + '  '.join(
        f'{stage.name:>12}' for stage in experiment.stages
    )
    rows = [
        f'{path:{width}}  {"×".join(map(str, leaf.shape)) or "-":>18}  {leaf.dtype.name:>8}  {bytes_of(leaf) / 1e3:9.1f}  '
        + '  '.join(f'{column[path]:>12}' for column in columns)
        for path, leaf in flat.items()
    ]
    return [header, *rows, f'{"total":{width}}  {sum(map(parameter_count, flat.values())):>18,}']


def _memory(experiment: Experiment, stage: Stage, layout: Layout) -> list[str]:
    trained, frozen = trees.split(layout.state.params, layout.partition.trainable.__contains__)
    parts = {
        'trainable parameters': bytes_of(trained),
        'frozen parameters': bytes_of(frozen),
        'gradients': bytes_of(trained),
        'optimizer state': bytes_of(layout.state.opt_state),
        'collections': bytes_of(layout.state.collections),
        'activations kept for the gradient': _activations(experiment, stage.objective, layout),
    }
    lines = [
        f'{stage.name}: {stage.steps:,} steps; {parameter_count(trained):,} trainable, {parameter_count(frozen):,} frozen'
    ]
    lines += [f'  {size / 1e6:10.2f} MB  {what}' for what, size in parts.items()]
    return [*lines, f'  {sum(parts.values()) / 1e6:10.2f} MB  estimate, before sharding and XLA’s own temporaries']


def _rules(experiment: Experiment, number: int) -> list[str]:
    """The stage's rules as written out, with their optimizers."""
    after = ' (decided when it begins)' if callable(experiment.stages[number].rules) else ''
    return [f'  trains{after}:'] + [
        f'    {regex}: ' + ('frozen' if spec is None else ' '.join(f'{k}={v}' for k, v in spec.items()))
        for regex, spec in experiment.rules(number)
    ]


def _activations(experiment: Experiment, objective: Objective, layout: Layout) -> int:
    """Bytes that the backward pass of the largest phase keeps from the forward pass, before XLA fuses any away."""
    trained, frozen = trees.split(layout.state.params, layout.partition.trainable.__contains__)
    largest = 0
    for phase in phases_of(objective):

        def residuals(trained, frozen, collections, batch, key, phase=phase):
            def loss(params):
                variables = {'params': trees.merge(frozen, params), **collections, **progress(0, 1)}
                return phase.loss(variables, batch, key)[0]

            return jax.vjp(loss, trained)[1]

        kept = jax.eval_shape(residuals, trained, frozen, layout.state.collections, experiment.batch, jax.random.key(0))
        largest = max(largest, bytes_of(kept) - bytes_of(trained))
    return max(largest, 0)
