"""Section [verify]."""

from ovexport.recipe.spec import Spec


class VerifySpec(Spec):
    """The proof.

    Attributes:
        runtime: also compile the IR and check the graph that the runtime executes.
    """

    runtime: bool = True
