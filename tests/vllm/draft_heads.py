"""A small model that recites, and heads that are trained in seconds to draft what it says next.

The model looks for an earlier occurrence of the last token, and answers with what followed it
there. Two layers of attention do that; their weights are set by hand. So each answer depends on the
KV of a few positions far back. The heads begin with random weights, and learn the same from the
model's hidden states: at position t a head sees token t + 1 and the model's hidden state of
position t, which encodes token t. One layer of attention is enough; it sees nothing but its own KV.

The same model is written as a Llama, for EAGLE and EAGLE-3, and as a MiMo, for MTP.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexkv.testing.tiny_model import TOKENS_MAX, VOCABULARY

from .conversations import WORDS

LLAMA, MIMO = "llama", "mimo"
TARGETS = {"eagle": LLAMA, "eagle3": LLAMA, "mtp": MIMO}
"""The model that a method's head drafts for."""
DRAFTS = {"eagle": 2, "eagle3": 2, "mtp": 1}
"""How many tokens a head drafts at once; from the second on it sees its own hidden states."""
HIDDEN, HEADS, HEAD_SIZE, LAYERS = 128, 2, 64, 2
ROPE_THETA = 1e8
"""So large that rotary embeddings hardly turn half of a head's elements within a prompt."""
CODE = 32
"""The elements of the code, each 1 or -1, that identifies a token."""
TOKEN, BEFORE, NEXT = (slice(start, start + CODE) for start in range(0, 3 * CODE, CODE))
"""Where a hidden state has the codes of its token, of the token before, and of the next one."""
ALWAYS = 3 * CODE
"""The element that is 1 in each hidden state."""
TURNING = torch.arange(8)
"""The first elements of the pairs that rotary embeddings turn fast."""
STILL = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
"""The elements that they hardly turn."""
SEEN_STATES = [0, LAYERS]
"""The layers before which EAGLE-3 sees the hidden states; 0 stands for the embeddings."""
DOCUMENTS = [8] * 60 + [16] * 20 + [32] * 20 + [64] * 30
"""The tokens of a document, for each step of the training. Short ones are learned first."""
BATCH_TOKENS, RATE, WARM_STEPS, WEIGHT_STD = 256, 1e-2, 20, 0.1

States: TypeAlias = list[Tensor]
"""The embeddings of a batch, and its hidden states after each layer."""


class Attention(nn.Module):
    """Causal attention with rotary embeddings."""

    def __init__(self, inputs: int = HIDDEN) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (linear(inputs, HIDDEN) for _ in range(3))
        self.o_proj = linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the attention's output for `x` [batch, tokens, elements]."""
        shape = (*x.shape[:2], HEADS, HEAD_SIZE)
        q, k, v = (
            project(x).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, positions), turned(k, positions)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, inputs: int = HIDDEN) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn, self.mlp = Attention(inputs), Mlp()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states after the layer."""
        return self.after(x, self.input_layernorm(x), positions)

    def after(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states after the layer, whose attention sees `seen`."""
        x = x + self.self_attn(seen, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Target(nn.Module):
    """The model that recites."""

    def __init__(self, chance: torch.Generator) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, HIDDEN), norm()
        self.lm_head = linear(HIDDEN, VOCABULARY)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        for weight in (parameter for parameter in self.parameters() if parameter.dim() > 1):
            nn.init.zeros_(weight)
        codes = torch.randint(0, 2, (VOCABULARY, CODE), generator=chance) * 2.0 - 1.0
        with torch.no_grad():
            self.embed_tokens.weight[:, TOKEN] = codes
            self.embed_tokens.weight[:, ALWAYS] = 1.0
            self.lm_head.weight[:, NEXT] = codes / 2
            find_token_before(self.layers[0].self_attn)
            find_next_token(self.layers[1].self_attn)

    def forward(self, tokens: Tensor, positions: Tensor) -> States:
        """Return the embeddings, and the hidden states after each layer."""
        states = [self.embed_tokens(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], positions))
        return states


class Head(nn.Module):
    """A head: what it drafts at a position stands for the token after the next one."""

    def begin(self, target: Target, states: States) -> Tensor:
        """Return what the head takes of the model's hidden states."""
        raise NotImplementedError

    def forward(self, following: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the model's last linear layer is applied to, and what the next draft takes.

        Args:
            following: the embedding of the token after each position.
            hidden: what `begin` returned for each position, or the draft before.
            at: the positions.
        """
        raise NotImplementedError


class Eagle(Head):
    """The head of EAGLE: its only layer has no norm before its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.layers = linear(2 * HIDDEN, HIDDEN), nn.ModuleList([Layer()])
        del self.layers[0].input_layernorm

    def begin(self, target: Target, states: States) -> Tensor:
        """Return the last hidden states, after the model's last norm."""
        return target.norm(states[-1])

    def forward(self, following: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output for both."""
        x = self.fc(torch.cat([following, hidden], -1))
        x = self.layers[0].after(x, x, at)
        return x, x


class Eagle3(Head):
    """The head of EAGLE-3: it sees the hidden states of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = linear(len(SEEN_STATES) * HIDDEN, HIDDEN), norm()
        self.midlayer = Layer(2 * HIDDEN)
        self.midlayer.hidden_norm = norm()

    def begin(self, target: Target, states: States) -> Tensor:
        """Return a mixture of several hidden states."""
        return self.fc(torch.cat([states[layer] for layer in SEEN_STATES], -1))

    def forward(self, following: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output with and without a norm."""
        layer = self.midlayer
        seen = torch.cat([layer.input_layernorm(following), layer.hidden_norm(hidden)], -1)
        x = layer.after(hidden, seen, at)
        return self.norm(x), x


class Mtp(Head):
    """MiMo's layer that predicts a second token."""

    def __init__(self) -> None:
        super().__init__()
        self.token_layernorm, self.hidden_layernorm, self.final_layernorm = norm(), norm(), norm()
        self.input_proj, self.layer = linear(2 * HIDDEN, HIDDEN), Layer()

    def begin(self, target: Target, states: States) -> Tensor:
        """Return the last hidden states."""
        return states[-1]

    def forward(self, following: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output, after a norm, for both."""
        both = self.hidden_layernorm(hidden), self.token_layernorm(following)
        x = self.final_layernorm(self.layer(self.input_proj(torch.cat(both, -1)), at))
        return x, x


HEAD_KINDS: dict[str, type[Head]] = {"eagle": Eagle, "eagle3": Eagle3, "mtp": Mtp}


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def norm() -> nn.RMSNorm:
    """Return a norm over a hidden state."""
    return nn.RMSNorm(HIDDEN, eps=1e-5)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Return `x` [batch, heads, tokens, elements] with rotary embeddings."""
    angles = positions[:, None, :, None] * speeds()
    cosine, sine = angles.cos(), angles.sin()
    left, right = x.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)


def speeds() -> Tensor:
    """Return by how much each pair of elements turns from one position to the next."""
    return ROPE_THETA ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)


def find_token_before(attention: Attention) -> None:
    """Set the weights of a layer that looks one position back and notes the token there."""
    look_back(attention, 1, 0)
    copy(attention, 0, 0.5, (TOKEN, BEFORE))


def find_next_token(attention: Attention) -> None:
    """Set the weights of a layer that looks for the position after the same token elsewhere.

    It also erases the token before from the hidden state. So a head can learn what followed a token
    only from the KV that it has itself written at that token's position.
    """
    attention.q_proj.weight[STILL, TOKEN] = 3.0 * torch.eye(CODE)
    attention.k_proj.weight[STILL, BEFORE] = 3.0 * torch.eye(CODE)
    copy(attention, 0, 0.7, (TOKEN, NEXT))
    look_back(attention, 0, HEAD_SIZE)
    copy(attention, HEAD_SIZE, -0.7, (BEFORE, BEFORE))


def look_back(attention: Attention, distance: int, first: int) -> None:
    """Make the attention head that begins at `first` look `distance` positions back."""
    turn = speeds()[TURNING] * distance
    attention.k_proj.weight[first + TURNING, ALWAYS] = 7.0
    attention.q_proj.weight[first + TURNING, ALWAYS] = 7.0 * turn.cos()
    attention.q_proj.weight[first + TURNING + HEAD_SIZE // 2, ALWAYS] = -7.0 * turn.sin()


def copy(attention: Attention, first: int, scale: float, where: tuple[slice, slice]) -> None:
    """Make the attention head that begins at `first` copy a code from where it looks.

    Args:
        attention: the layer.
        first: the head's first element.
        scale: undoes the norm before the layer.
        where: where the code is at that position, and where it is added.
    """
    source, target = where
    attention.v_proj.weight[first : first + CODE, source] = scale * torch.eye(CODE)
    attention.o_proj.weight[target, first : first + CODE] = torch.eye(CODE)


def trained(method: str, target: Target, chance: torch.Generator) -> Head:
    """Return a head that has learned to draft."""
    head = HEAD_KINDS[method]()
    for weight in (parameter for parameter in head.parameters() if parameter.dim() > 1):
        nn.init.normal_(weight, 0.0, WEIGHT_STD, generator=chance)
    optimizer = torch.optim.Adam(head.parameters(), betas=(0.9, 0.98))
    for step, size in enumerate(DOCUMENTS):
        rate = min(1.0, (step + 1) / WARM_STEPS) * (1.0 - step / len(DOCUMENTS))
        optimizer.param_groups[0]["lr"] = RATE * rate
        tokens, positions = documents(BATCH_TOKENS // size, size, chance)
        with torch.no_grad():
            states = target(tokens, positions)
        following, at = target.embed_tokens(tokens[:, 1:]).detach(), positions[:, 1:]
        hidden = begun = head.begin(target, [state[:, :-1] for state in states])
        right, loss = tokens[:, size + 2 :].flatten(), torch.zeros(())
        for _ in range(DRAFTS[method]):
            drafted, passed_on = head(following, hidden, at)
            # Only the second half can be predicted; in the first, the model's states are kept.
            logits = target.lm_head(drafted[:, size:-1])
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), right)
            hidden = torch.cat([begun[:, :size], passed_on[:, size - 1 : -1]], 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def documents(count: int, size: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return documents of tokens that are said twice, and positions: the second time far behind."""
    words = torch.arange(WORDS.start, WORDS.stop)
    once = torch.stack(
        [words[torch.randperm(len(words), generator=chance)[:size]] for _ in range(count)]
    )
    positions = torch.arange(2.0 * size).repeat(count, 1)
    positions[:, size:] += torch.randint(0, 600, (count, 1), generator=chance)
    return torch.cat([once, once], 1), positions


def make(folder: str) -> Generator[str, Any, None]:
    """Write both targets, and a head for each method. Run this in a process with vLLM's venv.

    The folders are named after the targets and the methods. MTP's head is a part of its target.
    """
    torch.set_num_threads(1)
    target = Target(torch.Generator().manual_seed(0)).requires_grad_(requires_grad=False)
    heads = {
        method: trained(method, target, torch.Generator().manual_seed(1)) for method in TARGETS
    }
    at = Path(folder)
    body = dict(named(target))
    write(at / LLAMA, "LlamaForCausalLM", body)
    write(at / "eagle", "LlamaForCausalLM", heads["eagle"].state_dict(), num_hidden_layers=1)
    aux = {
        "eagle_aux_hidden_state_layer_ids": SEEN_STATES,
        "num_aux_hidden_states": len(SEEN_STATES),
    }
    write(
        at / "eagle3", "LlamaForCausalLM", heads["eagle3"].state_dict(), num_hidden_layers=1, **aux
    )
    body |= {
        f"model.mtp_layers.0.{name.removeprefix('layer.')}": weight
        for name, weight in heads["mtp"].state_dict().items()
    }
    biased = {
        name.replace("weight", "bias"): torch.zeros(HIDDEN)
        for name in body
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    write(
        at / MIMO, "MiMoForCausalLM", body | biased, model_type="qwen2", num_nextn_predict_layers=1
    )
    yield "made"


def named(target: Target) -> Iterator[tuple[str, Tensor]]:
    """Return the target's weights with the names that checkpoints give them."""
    for name, weight in target.state_dict().items():
        yield (name if name.startswith("lm_head") else f"model.{name}"), weight


def write(folder: Path, architecture: str, weights: dict[str, Tensor], **more: Any) -> None:
    """Write a checkpoint."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": [architecture], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE,
        "max_position_embeddings": TOKENS_MAX, "rms_norm_eps": 1e-5, "rope_theta": ROPE_THETA,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, **more,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts, indent=2))
