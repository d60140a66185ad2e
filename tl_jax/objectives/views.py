"""Views: wrappers that show an objective another batch than the stream's."""

import jax
from jax import nn

from tl_jax.data.mixing import cutmix as cutmix_images
from tl_jax.data.mixing import mixup as mixup_images
from tl_jax.objectives.base import Objective, with_loss


def mixed(
    objective: Objective, *, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, stream: str = 'train'
) -> Objective:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) on one stream.

    Each is given by the parameter of its Beta distribution, 0 for none; with both, every step draws one of them. Acts on
    the whole batch on the device, so that it is the same on any number of processes. Labels [B] become `target` [B, C].
    """
    mixers = [(mix, alpha) for mix, alpha in ((mixup_images, mixup), (cutmix_images, cutmix)) if alpha > 0]

    def mix(loss):
        def mixed_loss(variables, batch, key):
            draw, choose, rest = jax.random.split(key, 3)
            fields = batch[stream]
            target = nn.one_hot(fields['label'], num_classes)
            branches = [lambda i, t, mixer=mixer, alpha=alpha: mixer(draw, i, t, alpha) for mixer, alpha in mixers]
            which = jax.random.randint(choose, (), 0, len(branches))
            image, target = jax.lax.switch(which, branches, fields['image'], target)
            return loss(variables, {**batch, stream: {**fields, 'image': image, 'target': target}}, rest)

        return mixed_loss

    return with_loss(objective, mix)._replace(altered=True) if mixers else objective
