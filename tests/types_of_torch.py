"""What mypy is told of torch: an attribute of a network may be anything.

torch says that what a network holds is a tensor or another network, so `segmenter.n_classes`, a number, would be an
error wherever a function takes any `nn.Module`. Named in .mypy.ini.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

MODULE = "torch.nn.modules.module.Module."


def anything(context: AttributeContext) -> Type:
    """Of a name that no class declares."""
    return AnyType(TypeOfAny.special_form)


class Networks(Plugin):
    """Leaves names that are looked up in a network while it runs unchecked; declared ones are checked."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Asked for every attribute; a declared one of `nn.Module` keeps its type."""
        return self.of_network if fullname.startswith(MODULE) else None

    def of_network(self, context: AttributeContext) -> Type:
        """`Any` for torch's "a tensor or another network"."""
        union = str(context.default_attr_type)
        return anything(context) if "Tensor" in union and "Module" in union else context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return Networks
