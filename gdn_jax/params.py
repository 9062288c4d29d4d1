"""The one way to make a parameter: its value, its axes and its role, declared together.

Initialisation scale, learning-rate multiplier, weight decay and sharding are all derived from the
declaration (:class:`ParamSpec`) by pure functions; no code matches on parameter names or paths.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gdn_jax.mup import axes as ax
from gdn_jax.mup.spec import RANDOM_ROLES, ParamSpec, Role


def make_param(
    key: jax.Array,
    initializer: Callable[[jax.Array, tuple[int, ...], Any], jax.Array],
    sizes: Mapping[str, int],
    axes: tuple[str, ...],
    *,
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    role: Role,
    init_scale: Callable[[ParamSpec], jax.Array | float],
) -> nnx.Param:
    """Makes a float32 parameter that carries its :class:`ParamSpec` as metadata ``spec``.

    Args:
        key: PRNG key.
        initializer: ``(key, shape, dtype) -> array``; draws of unit variance for the roles in
            ``RANDOM_ROLES``, the final values for the others.
        sizes: axis name to size.
        axes: axis name of each dimension; the shape is ``sizes[axis]`` of each.
        in_axes: axes summed over.
        out_axes: axes produced.
        role: the row of the rule table.
        init_scale: standard deviation as a function of the spec; may be traced.

    Raises:
        ValueError: an axis is unknown, or what :func:`declare` refuses.
    """
    unknown = sorted(set(axes) - set(sizes))
    if unknown:
        raise ValueError(f"axes must be among {', '.join(sorted(sizes))}; got {', '.join(unknown)}.")
    shape = tuple(sizes[axis] for axis in axes)
    spec = _checked_spec(shape, axes, in_axes, out_axes, role)
    value = initializer(key, shape, jnp.float32)
    if role in RANDOM_ROLES:
        value = value * init_scale(spec)
    return nnx.Param(value, spec=spec)


def declare(
    param: nnx.Param,
    axes: tuple[str, ...],
    *,
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    role: Role,
) -> None:
    """Declares a parameter that other code made (an ``nnx.Linear`` kernel, say), in place.

    The value is left as it is: initialising it at the scale that the rules ask for is the caller's task.

    Axes have names of their own, and a learning rate follows from how much they grow. Of a square matrix from the
    model width to itself (``nnx.Linear(D, D)``) declare ``("embed", "mlp")``: ``GDNConfig.widen`` grows both alike.

    Args:
        param: the parameter.
        axes: name of each dimension.
        in_axes: axes summed over.
        out_axes: axes produced.
        role: row of the rule table.

    Raises:
        ValueError: axes that are not one name per dimension, in or out axes that are not among them or are named
            twice, an unknown role, or a convolution without ``conv``.
    """
    param.set_metadata(spec=_checked_spec(tuple(param.shape), axes, in_axes, out_axes, role))


def _checked_spec(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    role: Role,
) -> ParamSpec:
    if len(axes) != len(shape):
        raise ValueError(f"axes must name each dimension of a parameter of shape {shape}; got {axes}.")
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"axes must be different names, since in and out axes are told apart by them; got {axes}. Of a square "
            f"matrix from the model width to itself make it {(ax.EMBED, ax.MLP)}: GDNConfig.widen grows both alike."
        )
    acting = (*in_axes, *out_axes)
    foreign = sorted(set(acting) - set(axes))
    if foreign:
        raise ValueError(f"in_axes and out_axes must be among axes {axes}; got {', '.join(foreign)} besides.")
    if len(set(acting)) < len(acting):
        raise ValueError(
            f"an axis must be in in_axes or in out_axes, and once; got {in_axes} and {out_axes}. "
            "Of a gain or a bias it is an out axis."
        )
    if role not in Role:
        raise ValueError(f"role must be one of {', '.join(Role)}; got {role!r}.")
    if role == Role.CONV and ax.CONV not in axes:
        raise ValueError(f"axes of role {Role.CONV} must have {ax.CONV!r}, that of the taps; got {axes}.")
    sizes = dict(zip(axes, shape, strict=True))
    fan_in = math.prod(sizes[axis] for axis in ((ax.CONV,) if role == Role.CONV else in_axes))
    # A role may come as its name; rules ask for the member.
    return ParamSpec(axes, in_axes, out_axes, Role(role), fan_in, shape)


def stack_layers[M: nnx.Module](make_layer: Callable[[jax.Array], M], keys: jax.Array) -> M:
    """Makes ``len(keys)`` layers as one module whose parameters have a leading ``layers`` axis.

    ``nnx.vmap`` stacks the values but not the axis names; this adds them.

    Args:
        make_layer: PRNG key of a layer to the layer, its parameters declared.
        keys: PRNG keys, one per layer.

    Raises:
        ValueError: a parameter was never declared, or is not of the shape that it was declared with.
    """
    stacked = nnx.vmap(make_layer)(keys)
    params = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(stacked)
        if isinstance(node, nnx.Param)
    }
    specs = _require_declared({path: param.get_metadata().get("spec") for path, param in params.items()})
    _require_shapes(specs, {path: param.shape[1:] for path, param in params.items()})
    for path, param in params.items():
        spec = specs[path]
        param.set_metadata(
            spec=dataclasses.replace(spec, axes=(ax.LAYERS, *spec.axes), sizes=(len(keys), *spec.sizes))
        )
    return stacked


def declared(
    initializer: Callable[..., jax.Array],
    axes: tuple[str, ...],
    *,
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    role: Role,
) -> Callable[..., Any]:
    """A Linen initializer whose parameter carries its declaration, as ``nn.with_partitioning`` carries names.

    ``nn.Dense(64, kernel_init=declared(init, ("embed", "mlp"), in_axes=("embed",), ...))``. The initial
    scale is the initializer's; read the declarations with ``param_specs`` before ``nn.unbox``. They do not survive
    ``nn.scan`` and ``nn.vmap``: Flax has no hook there. Stack NNX layers (:func:`stack_layers`) inside
    ``nnx.bridge.ToLinen`` in their place.

    Args:
        initializer: ``(key, shape, dtype) -> array``.
        axes: name of each dimension.
        in_axes: axes summed over.
        out_axes: axes produced.
        role: row of the rule table.

    Raises:
        ValueError: when a parameter is initialised, as :func:`declare` does.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        param = nnx.Param(initializer(key, shape, dtype))
        declare(param, axes, in_axes=in_axes, out_axes=out_axes, role=role)
        return nnx.bridge.NNXMeta(nnx.Param, param[...], {"spec": param.get_metadata("spec")})

    return init


def param_specs(params: Any) -> Any:
    """The declarations of a model's parameters, one :class:`ParamSpec` in the place of each.

    Args:
        params: an ``nnx.Module``; a tree of ``nnx.Param`` (``nnx.state(model, nnx.Param)``); or Linen's
            ``variables["params"]`` before ``nn.unbox``. Abstract values (``nnx.eval_shape``) do.

    Returns:
        From a module a nested dict, else a tree like ``params``.

    Raises:
        ValueError: parameters were never declared, or have another shape than they were declared with (layers
            stacked by ``nnx.vmap`` or ``nn.scan``); the message names all of them.
    """
    if isinstance(params, nnx.Module):
        params = nnx.traversals.unflatten_mapping(dict(nnx.to_flat_state(nnx.state(params, nnx.Param))))

    def is_param(x: Any) -> bool:
        return isinstance(x, nnx.Variable | nnx.bridge.NNXMeta)

    def spec_of(x: Any) -> ParamSpec | None:
        if isinstance(x, nnx.Variable):
            return x.get_metadata().get("spec")
        return x.metadata.get("spec") if isinstance(x, nnx.bridge.NNXMeta) else None

    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
    specs = _require_declared({path: spec_of(x) for path, x in named.items()})
    _require_shapes(
        specs,
        {path: x.value.shape if isinstance(x, nnx.bridge.NNXMeta) else x.shape for path, x in named.items()},
    )
    return jax.tree.map(spec_of, params, is_leaf=is_param)


def _require_declared(specs: Mapping[str, ParamSpec | None]) -> dict[str, ParamSpec]:
    declared = {path: spec for path, spec in specs.items() if isinstance(spec, ParamSpec)}
    missing = [path for path in specs if path not in declared]
    if missing:
        raise ValueError(
            f"every parameter must be declared with axes and a role; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not. Use gdn_jax.declare (NNX) or gdn_jax.declared (Linen)."
        )
    return declared


def _require_shapes(specs: Mapping[str, ParamSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [
        f"{path} was declared with {spec.sizes} and has {shapes[path]}"
        for path, spec in specs.items()
        if spec.sizes != shapes[path]
    ]
    if wrong:
        raise ValueError(
            f"a parameter must have the shape that it was declared with; {', '.join(wrong)}. Stack layers with "
            "gdn_jax.stack_layers: nnx.vmap leaves declarations as they were. So do Linen's nn.scan and nn.vmap, which "
            "cannot carry them: stack NNX layers inside nnx.bridge.ToLinen, or make Linen layers one by one (they get "
            "no depth factors)."
        )
