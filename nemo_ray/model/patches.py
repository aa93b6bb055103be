"""What transformers' nemotron_h gets wrong or cannot do, put right on the instance.

- Packed rows: convolution and scan stop at document edges, attention is block-causal (upstream leaks).
- `time_step_limit` comes from the config, as in NVIDIA's reference (upstream clamps at time_step_min).
- `out_proj` is called as a module, outside the fused kernel, so that LoRA on it acts in training too.
- Linear layers and routed experts are ours (linear.py, experts.py): their weights may be float32 masters of
  a bf16 computation, or in 4 bits.

Nothing here changes a class: every patch binds to one model and checks the upstream code that it stands on.
"""

import inspect
import types
from collections.abc import Callable

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.nemotron_h import modeling_nemotron_h as upstream

from nemo_ray.errors import PatchError
from nemo_ray.model.activation import ReluSquared
from nemo_ray.model.attention import packed_attention
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.linear import BaseLinear, linear
from nemo_ray.model.norm import norm_again, residual_norm
from nemo_ray.model.remake import Remake
from nemo_ray.model.routing import route, router_logits
from nemo_ray.model.ssd import select_split_conv1d_scan

# What the patches rely on: the parameters each upstream forward must take, and the modules that it must hold.
# Caches and masks are passed on as they come: 5.24 renamed `past_key_values` and `cache_params` to `cache`.
EXPECTED_FORWARD = {
    "NemotronHMamba2Mixer": ("hidden_states",),
    "NemotronHAttention": ("hidden_states",),
    "NemotronHMoE": ("hidden_states",),
    "NemotronHMLP": (),
    "NemotronHExperts": ("hidden_states", "top_k_index", "top_k_weights"),
    "NemotronHBlock": ("hidden_states",),
}
KNOWN_VERSIONS = "the patches know transformers 5.16 to 5.24"
EXPECTED_CHILDREN = {
    "NemotronHMamba2Mixer": ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj")
    + ("chunk_size", "activation", "head_dim", "n_groups"),
    "NemotronHAttention": ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "head_dim"),
    "NemotronHMoE": ("experts", "gate", "shared_experts", "fc1_latent_proj", "fc2_latent_proj"),
    "NemotronHExperts": ("up_proj", "down_proj"),
    "NemotronHTopkRouter": ("weight", "e_score_correction_bias", "top_k", "num_group", "topk_group")
    + ("norm_topk_prob", "routed_scaling_factor"),
    "NemotronHMLP": ("up_proj", "down_proj", "act_fn"),
    "NemotronHBlock": ("norm", "mixer", "block_type"),
}


def patch_model(
    model: "upstream.NemotronHForCausalLM", device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Bind the patches to `model`, which will run on `device` (it may still be on meta).

    Args:
        compute_dtype: of the activations; parameters may be of another one.

    Adds the method `packed_logits(batch)`, and to each block the switch `recompute` (make its activations
    again in the backward pass of training); plain calls of `model` go on as upstream has them.
    Raises: PatchError where the installed transformers does not look as the patches expect.
    """
    check_upstream()
    if model.config.mlp_hidden_act != "relu2":
        raise PatchError(
            f"mlp_hidden_act is {model.config.mlp_hidden_act!r}: Nemotron-H experts are relu2 only"
        )
    scan = select_split_conv1d_scan(device)
    for block in model.model.layers:
        _check_children(block)
        _replace_linears(block)
        _patch_block(block)
        mixer = block.mixer
        _check_children(mixer)
        if isinstance(mixer, upstream.NemotronHMamba2Mixer):
            _patch_mamba(mixer, scan)
        elif isinstance(mixer, upstream.NemotronHAttention):
            _patch_attention(mixer)
        elif isinstance(mixer, upstream.NemotronHMoE):
            _check_children(mixer.experts)
            _check_children(mixer.gate)
            _patch_moe(mixer)
        elif isinstance(mixer, upstream.NemotronHMLP):
            _patch_mlp(mixer)
        else:
            raise _misfit(f"the patches do not know {type(mixer).__name__}, the mixer of a block")
        block.recompute = False
    model.draws_numbers = False  # dropout does, which a second forward pass has to repeat
    model.compute_dtype = compute_dtype
    model.packed_logits = types.MethodType(packed_logits, model)


def check_upstream() -> None:
    """Compare the installed nemotron_h with what the patches rely on."""
    for name, wanted in EXPECTED_FORWARD.items():
        cls = getattr(upstream, name, None)
        if cls is None:
            raise _misfit(f"{upstream.__name__} has no {name}")
        found = inspect.signature(cls.forward).parameters
        missing = [parameter for parameter in wanted if parameter not in found]
        if missing:
            raise _misfit(f"{name}.forward lacks {', '.join(missing)}")


def _check_children(module: nn.Module) -> None:
    name = type(module).__name__
    missing = [child for child in EXPECTED_CHILDREN.get(name, ()) if not hasattr(module, child)]
    if missing:
        raise _misfit(f"{name} has no {', '.join(missing)}")


def _misfit(what: str) -> PatchError:
    return PatchError(f"transformers {transformers.__version__}: {what}; {KNOWN_VERSIONS}")


def _replace_linears(block: nn.Module) -> None:
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, BaseLinear(module.weight, module.bias))


def _patch_block(block: nn.Module) -> None:
    original = type(block).forward  # not bound: a deep copy of the block must run on its own weights

    def forward(
        self: nn.Module, hidden_states: torch.Tensor, packed: PackedBatch | None = None, **kwargs: object
    ) -> torch.Tensor:
        if packed is None:
            return original(self, hidden_states, **kwargs)
        residual, inside = residual_norm(hidden_states, self.norm)
        again = norm_again(hidden_states, self.norm)
        if self.block_type == "linear_attention":
            inside = self.mixer(inside, packed=packed, again=again)
        elif self.block_type == "full_attention":  # three layers would make it three times
            inside, _ = self.mixer(inside, packed=packed)
        elif self.block_type == "moe":
            inside = self.mixer(inside, packed=packed, again=again)
        else:  # mlp
            inside = self.mixer(inside, again=again)
        return residual + inside

    block.forward = types.MethodType(forward, block)


def _patch_mamba(mixer: nn.Module, scan: Callable[..., tuple[torch.Tensor, Remake | None]]) -> None:
    mixer.time_step_limit = tuple(mixer.config.time_step_limit)
    original = type(mixer).forward

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        packed: PackedBatch | None = None,
        again: Remake | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if packed is None:
            return original(self, hidden_states, **kwargs)
        dtype, bias = hidden_states.dtype, self.conv1d.bias
        y, y_again = scan(
            self.in_proj(hidden_states, again),
            self.conv1d.weight.squeeze(1).to(dtype),
            bias if bias is None else bias.to(dtype),
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            D=self.D,
            chunk_size=self.chunk_size,
            seq_idx=packed.seq_idx,
            dt_limit=self.time_step_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight.to(dtype),
            rmsnorm_eps=self.norm.variance_epsilon,
            headdim=self.head_dim,
            ngroups=self.n_groups,
            norm_before_gate=False,
        )
        return self.out_proj(y, y_again)

    mixer.forward = types.MethodType(forward, mixer)


def _patch_attention(mixer: nn.Module) -> None:
    original = type(mixer).forward

    def forward(
        self: nn.Module, hidden_states: torch.Tensor, packed: PackedBatch | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        if packed is None:
            return original(self, hidden_states=hidden_states, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        out = packed_attention(
            self.q_proj(hidden_states).view(heads),
            self.k_proj(hidden_states).view(heads),
            self.v_proj(hidden_states).view(heads),
            packed,
            self.scaling,
        )
        return self.o_proj(out.flatten(2)), None

    mixer.forward = types.MethodType(forward, mixer)


def _patch_moe(mixer: nn.Module) -> None:
    mixer.experts = RoutedExperts(mixer.experts.up_proj, mixer.experts.down_proj)
    _patch_mlp(mixer.shared_experts)
    original = type(mixer).forward

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        packed: PackedBatch | None = None,
        again: Remake | None = None,
    ) -> torch.Tensor:
        if packed is None:
            return original(self, hidden_states)
        # First, so that recomputation, which ends with the last thing that was kept, ends within the experts.
        shared = self.shared_experts(hidden_states, again)
        gate, tokens = self.gate, hidden_states.flatten(0, 1)
        weights, experts = route(
            router_logits(tokens, gate.weight),
            gate.e_score_correction_bias,
            gate.top_k,
            gate.num_group,
            gate.topk_group,
            gate.norm_topk_prob,
            gate.routed_scaling_factor,
        )
        if not isinstance(self.fc1_latent_proj, nn.Identity):
            tokens, again = self.fc1_latent_proj(tokens, again), None
        routed = self.fc2_latent_proj(self.experts(tokens, experts, weights, again))
        return shared + routed.view_as(hidden_states)

    mixer.forward = types.MethodType(forward, mixer)


def _patch_mlp(mlp: nn.Module) -> None:
    mlp.act_fn = ReluSquared()

    def forward(self: nn.Module, x: torch.Tensor, again: Remake | None = None) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x, again)))

    mlp.forward = types.MethodType(forward, mlp)


def packed_hidden(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Final hidden states (B, T, H) of packed documents, after the last norm, in `model.compute_dtype`.

    Not a method: under FSDP only what runs inside a registered forward method of the root sees whole
    parameters.
    """
    hidden = model.model.embeddings(batch.input_ids).to(model.compute_dtype)
    for block in model.model.layers:
        if block.recompute and model.training:
            hidden = checkpoint(
                block, hidden, packed=batch, use_reentrant=False, preserve_rng_state=model.draws_numbers
            )
        else:
            hidden = block(hidden, packed=batch)
    return residual_norm(hidden, model.model.norm_f)[1]


def packed_logits(self: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Logits (B, T, V) in float32. For short batches: the training loss never forms them whole."""
    return linear(packed_hidden(self, batch), self.lm_head.weight).float()
