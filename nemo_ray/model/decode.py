"""Generation with caches: one forward that reads the next tokens of a text, many or one.

It runs the patched model's own modules, so that adapters, 4-bit weights and routed experts act as they do in
training; transformers' caches, masks and `use_cache` have no part in it. What a block remembers of the tokens
read: attention its keys and values, Mamba-2 the last inputs of its convolution and its state; others nothing.

Shapes: B texts, T new tokens, S tokens read so far with the new ones, Q query heads, V key/value heads,
E attention head dim, H Mamba heads, P head dim, G groups, N state, K conv width, D conv channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_ray.model.linear import linear
from nemo_ray.model.norm import rms_norm
from nemo_ray.model.ssd import DtLimit, causal_conv1d, gated_group_norm, select_chunk_scan

PIECE_TOKENS = 2048  # of a prompt at a time: bounds the memory of reading a long one
ROOM_TOKENS = 256  # that a new cache has room for


@dataclass
class AttentionCache:
    """Keys and values: buffers (B, V, room, E) of which the first `num_tokens` are filled."""

    num_tokens: int = 0
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add those of T tokens (B, V, T, E); returns all so far, (B, V, S, E)."""
        start, stop = self.num_tokens, self.num_tokens + key.shape[2]
        self.keys = with_room(self.keys, key, stop)
        self.values = with_room(self.values, value, stop)
        self.keys[:, :, start:stop] = key
        self.values[:, :, start:stop] = value
        self.num_tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def with_room(buffer: torch.Tensor | None, like: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`buffer` where it holds `num_tokens`, else a copy with twice the room; a new one takes after `like`."""
    room = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and num_tokens <= room:
        return buffer
    batch, heads, _, head_dim = like.shape
    larger = like.new_empty(batch, heads, max(num_tokens, 2 * room, ROOM_TOKENS), head_dim)
    if buffer is not None:
        larger[:, :, :room] = buffer
    return larger


@dataclass
class MambaCache:
    """The last K-1 inputs of the convolution (B, K-1, D), and the state (B, H, P, N), never below float32."""

    conv_tail: torch.Tensor | None = None
    state: torch.Tensor | None = None


class Cache:
    """What `model` remembers of the tokens it has read."""

    def __init__(self, model: nn.Module) -> None:
        self.chunk_scan = select_chunk_scan(model.model.embeddings.weight.device)
        self.blocks: list[AttentionCache | MambaCache | None] = []
        for block in model.model.layers:
            if block.block_type == "full_attention":
                self.blocks.append(AttentionCache())
            else:
                self.blocks.append(MambaCache() if block.block_type == "linear_attention" else None)


@torch.no_grad()
def next_logits(model: nn.Module, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read `ids` (B, T) after all that `cache` holds, and add them to it.

    How a text is split over calls makes no difference. Where the model is sharded, every rank must call it
    with the same ids, after some packed forward has been run.

    Returns: the last token's logits (B, vocabulary), float32.
    """
    with _whole(model):
        hidden = model.model.embeddings(ids).to(model.compute_dtype)
        for block, memory in zip(model.model.layers, cache.blocks, strict=True):
            with _whole(block):
                hidden = hidden + _mix(block, hidden, memory, cache)
        last = rms_norm(hidden[:, -1], model.model.norm_f)
        return linear(last, model.lm_head.weight).float()


def read_prompt(
    model: nn.Module, ids: torch.Tensor, cache: Cache, piece_tokens: int = PIECE_TOKENS
) -> torch.Tensor:
    """`next_logits` of a long text (B, T), in pieces."""
    for piece in ids.split(piece_tokens, dim=1):
        logits = next_logits(model, piece, cache)
    return logits


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Gather the parameters of `module` that are sharded: hooks do so in calls of its forward only."""
    if (make_whole := getattr(module, "make_whole", None)) is not None:
        make_whole()
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _mix(
    block: nn.Module, hidden: torch.Tensor, memory: AttentionCache | MambaCache | None, cache: Cache
) -> torch.Tensor:
    """What the block adds to `hidden` (B, T, model size)."""
    normed = rms_norm(hidden, block.norm)
    if isinstance(memory, AttentionCache):
        return _attention(block.mixer, normed, memory)
    if isinstance(memory, MambaCache):
        return _mamba(block.mixer, normed, memory, cache)
    return block.mixer(normed)


def _attention(mixer: nn.Module, hidden: torch.Tensor, memory: AttentionCache) -> torch.Tensor:
    heads = (*hidden.shape[:-1], -1, mixer.head_dim)
    query, key, value = (
        project(hidden).view(heads).transpose(1, 2) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    out = cached_attention(query, *memory.append(key, value), mixer.scaling)
    return mixer.o_proj(out.transpose(1, 2).flatten(2))


def cached_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of the last T of S tokens over all tokens up to themselves.

    Args:
        query: (B, Q, T, E).
        keys, values: (B, V, S, E), Q a multiple of V.

    Returns: (B, Q, T, E).
    """
    num_new, num_all = query.shape[2], keys.shape[2]
    repeats = query.shape[1] // keys.shape[1]
    if num_new == 1:
        # The heads that share keys stand as rows of one head: nothing of the cache is copied.
        grouped = query.squeeze(2).unflatten(1, (-1, repeats))
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).flatten(1, 2).unsqueeze(2)
    keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
    if num_new == num_all:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    visible = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(num_all - num_new)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)


def _mamba(mixer: nn.Module, hidden: torch.Tensor, memory: MambaCache, cache: Cache) -> torch.Tensor:
    batch, num_tokens, _ = hidden.shape
    num_heads, head_dim, groups, state = (
        mixer.num_heads,
        mixer.head_dim,
        mixer.n_groups,
        mixer.ssm_state_size,
    )
    inner, tail = num_heads * head_dim, mixer.conv_kernel_size - 1
    gate, xBC, dt = mixer.in_proj(hidden).split([inner, inner + 2 * groups * state, num_heads], dim=-1)
    if memory.conv_tail is None or memory.state is None:
        compute = torch.promote_types(xBC.dtype, torch.float32)
        memory.conv_tail = xBC.new_zeros(batch, tail, xBC.shape[-1])
        memory.state = xBC.new_zeros(batch, num_heads, head_dim, state, dtype=compute)

    window = torch.cat([memory.conv_tail, xBC], dim=1)
    memory.conv_tail = window[:, num_tokens:].clone()  # a view would keep the whole piece
    weight, bias = mixer.conv1d.weight.squeeze(1).to(xBC.dtype), mixer.conv1d.bias
    xBC = causal_conv1d(
        window, weight, bias if bias is None else bias.to(xBC.dtype), activation=mixer.activation
    )
    x, B, C = xBC[:, tail:].split([inner, groups * state, groups * state], dim=-1)
    x, B, C = x.unflatten(-1, (num_heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    A, limit = -torch.exp(mixer.A_log.float()), mixer.time_step_limit
    if num_tokens == 1:
        y, memory.state = state_step(
            x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], memory.state, mixer.D, mixer.dt_bias, limit
        )
    else:
        y, memory.state = cache.chunk_scan(
            x,
            dt,
            A,
            B,
            C,
            mixer.chunk_size,
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            initial_states=memory.state,
            dt_softplus=True,
            dt_limit=limit,
            return_final_states=True,
        )
    y = y.reshape(batch, num_tokens, inner)
    y = gated_group_norm(y, gate, mixer.norm.weight.to(y.dtype), mixer.norm.variance_epsilon, groups)
    return mixer.out_proj(y)


def state_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: DtLimit,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ssd.ssd_scan` with softplus for one token: h = exp(dt A) h + dt B x, y = C h + D x; in state's dtype.

    Args:
        x: (B, H, P).  dt: (B, H).  A, D, dt_bias: (H,).  B, C: (B, G, N).  state: (B, H, P, N).

    Returns: y (B, H, P) in x's dtype, and the new state.
    """
    compute, per_group = state.dtype, x.shape[1] // B.shape[1]
    dt = F.softplus(dt.to(compute) + dt_bias.to(compute)).clamp(*dt_limit).unsqueeze(-1)
    B, C = (t.to(compute).repeat_interleave(per_group, dim=1) for t in (B, C))
    values = x.to(compute)
    decay = (dt * A.to(compute).unsqueeze(-1)).exp().unsqueeze(-1)
    state = state * decay + (values * dt).unsqueeze(-1) * B.unsqueeze(-2)
    y = (state @ C.unsqueeze(-1)).squeeze(-1) + values * D.to(compute).unsqueeze(-1)
    return y.to(x.dtype), state


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken: the likeliest at temperature 0, else drawn.

    Attributes:
        temperature: logits are divided by it.
        top_p: draw among the likeliest tokens only, the fewest that together have at least this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One token id from logits (vocabulary,); `generator` is of the logits' device."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        kept = ordered.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.zeros_like(kept).scatter(0, tokens, kept)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_tokens(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Token ids that follow `prompt_ids` (at least one), as they come, without the end token.

    Every rank must draw them together where the model is sharded; none may stop early.
    """
    ids = torch.tensor([list(prompt_ids)], device=model.model.embeddings.weight.device)
    cache = Cache(model)
    logits = read_prompt(model, ids, cache)
    for count in range(1, max_new_tokens + 1):
        token = choose_token(logits[0], sampling, generator)
        if token in eos_ids:
            return
        yield token
        if count < max_new_tokens:
            logits = next_logits(model, ids.new_tensor([[token]]), cache)
