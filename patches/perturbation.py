"""Methods that make a second, worse prediction of a step and lead the first one away from it: what denoisers are guided by."""

from __future__ import annotations

from collections.abc import Mapping

from accelplug.patches.base import Patch


class Perturbation(Patch):
    """A method that perturbs attention in a forward of its own, in which alone `attend` is asked.

    With e the prediction of the conditional branch and e' that of the same forward perturbed, ``scale * (e - e')`` is added to the
    predictions of all branches of the step, so that it stands behind whatever else guides: ``e_u + g (e - e_u)`` keeps its g.
    ``call.dense()`` is what attention, or another patch of the recipe, gives there. Where `prepare` returns None at every module
    there is no such forward.
    """

    family = "guidance"
    speed = False

    @property
    def scale(self) -> float:
        """Weight of the difference; rules that hold at once must have the same."""
        raise NotImplementedError

    def require_heads(self, heads: Mapping[int, int]) -> None:
        """Refuse settings for layers or heads that a model lacks; `heads` of each layer. Called at apply.

        Raises
        ------
        RecipeError
        """
