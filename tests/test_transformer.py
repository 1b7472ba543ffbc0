"""Attention and LayerNorm in the graph: every spelling becomes the same int8 ops, and what has no int8 kernel is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import probquant as pq
from probquant.compare import sqnr

WIDTH, HEADS, TOKENS = 32, 4, 9


class Block(nn.Module):
    """A pre-norm block around an attention that a subclass spells."""

    fused = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.uniform_(0.5, 2.0), norm.bias.normal_(0, 0.2)
        if not self.fused:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            with torch.no_grad():
                for i, layer in enumerate((self.q, self.k, self.v)):
                    layer.weight.copy_(self.qkv.weight.chunk(3)[i]), layer.bias.copy_(self.qkv.bias.chunk(3)[i])
            del self.qkv

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x)


class Timm(Block):
    def attention(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class TimmUnfused(Block):
    def attention(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


class Chunks(Block):
    def attention(self, x):
        b, n, c = x.shape
        q, k, v = (part.view(b, n, HEADS, -1).transpose(1, 2).flatten(0, 1) for part in self.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(torch.bmm(q, k.mT) / (c // HEADS) ** 0.5, -1)
        return self.proj(torch.bmm(weights, v).unflatten(0, (b, HEADS)).permute(0, 2, 1, 3).flatten(2))


class Separate(Block):
    fused = False

    def attention(self, x):
        q, k, v = (layer(x).view(x.shape[0], -1, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v))
        weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5, dim=-1)
        return self.proj(torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(x.shape))


class Multihead(Block):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        with torch.no_grad():
            self.mha.in_proj_weight.copy_(self.qkv.weight), self.mha.in_proj_bias.copy_(self.qkv.bias)
            self.mha.out_proj.weight.copy_(self.proj.weight), self.mha.out_proj.bias.copy_(self.proj.bias)
        del self.qkv, self.proj

    def attention(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class LayerScale(Timm):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def attention(self, x):
        return super().attention(x) * self.gamma


class PostNorm(Separate):
    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.head(self.norm2(x + self.fc2(F.gelu(self.fc1(x)))))


class CrossAttention(Separate):
    def attention(self, x):
        q, k, v = (layer(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer, y in ((self.q, x[:, :4]), (self.k, x), (self.v, x)))
        return F.pad(self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)), (0, 0, 0, TOKENS - 4))


class Masked(Timm):
    def attention(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c))


class Biased(TimmUnfused):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def attention(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((q @ k.transpose(-2, -1) * 0.3 + self.bias).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class QueryNorm(Timm):
    def attention(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(F.normalize(q, dim=-1), k, v).transpose(1, 2).reshape(b, n, c))


def tokens(seed: int, images: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, TOKENS, WIDTH, generator=generator) * torch.rand(images, TOKENS, 1, generator=generator).exp()


def quantized(block: type[Block], strategy: str = "dynamic", **options) -> tuple[nn.Module, pq.QuantizedModel]:
    model = block().eval()
    return model, pq.quantize(model, [tokens(0), tokens(1)], strategy=strategy, progress=False, **options)


def attention_of(qmodel: pq.QuantizedModel):
    (layer,) = (layer for layer in qmodel.layers if layer.kind == "attention")
    return layer


@pytest.mark.parametrize("block", [Timm, TimmUnfused, Chunks, Separate, Multihead])
def test_every_spelling_is_the_same_int8_model(block):
    model, qmodel = quantized(block)
    x = tokens(2)
    with torch.no_grad():
        assert float(sqnr(model(x), qmodel(x)).mean()) > 35
        assert torch.equal(qmodel(x), quantized(Timm)[1](x))
    assert all(layer.int8 for layer in qmodel.layers), qmodel.summary()
    assert len([layer for layer in qmodel.layers if layer.kind == "linear"]) == 7
    targets = {str(node.target) for node in qmodel.graph.nodes if node.op == "call_function"}
    assert targets == {"aten.contiguous.default", "<built-in function getitem>", "aten.add.Tensor"} | {
        f"probquant.{op}.default" for op in ("attention", "layer_norm", "linear", "quantize")
    }


@pytest.mark.parametrize("strategy", ["static", "dynamic", "probabilistic"])
@pytest.mark.parametrize("block", [LayerScale, PostNorm, CrossAttention])
def test_blocks(block, strategy):
    model, qmodel = quantized(block, strategy)
    x = tokens(2)
    with torch.no_grad():
        wanted, actual = model(x), qmodel(x)
        assert float(sqnr(wanted, actual).mean()) > (28 if strategy == "static" else 35)
        assert torch.equal(qmodel(x[2:3]), actual[2:3])
        assert qmodel(x[:0]).shape == wanted[:0].shape
    assert attention_of(qmodel).int8 and all(layer.int8 for layer in qmodel.layers if layer.kind != "layer_norm"), qmodel.summary()


@pytest.mark.parametrize(
    "block, reason", [(Masked, "a mask or a bias"), (Biased, "a mask or a bias"), (QueryNorm, "its query is not the output of a linear layer")]
)
def test_attention_that_stays_float_is_told(block, reason, tmp_path):
    model, qmodel = quantized(block)
    x = tokens(2)
    with torch.no_grad():
        assert float(sqnr(model(x), qmodel(x)).mean()) > 35
    layer = attention_of(qmodel)
    assert not layer.int8 and reason in layer.reason and reason in str(qmodel.summary())
    pq.save(qmodel, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "m.safetensors")(x), qmodel(x))


def test_a_probe_of_a_token_is_its_exact_range():
    """Which auto takes from the cheaper strategy where no law will do."""
    x = tokens(2)
    with torch.no_grad():
        exact, probe = (quantized(Timm, strategy, surrogate="probe", channel_profile=True)[1] for strategy in ("dynamic", "probabilistic"))
        assert torch.equal(exact(x), probe(x))
        auto = quantized(Timm, "probabilistic", surrogate="auto")[1]
    judged = [layer.judged for layer in auto.layers if layer.name in ("qkv.query", "qkv.key", "qkv.value", "fc1")]
    assert len(judged) == 4 and all("dynamic" in names and "probe" not in names for names in judged)


def test_a_fused_projection_is_excluded_by_its_own_name():
    model, qmodel = quantized(Timm, exclude=["qkv"])
    assert [layer.name for layer in qmodel.layers if layer.kind == "linear" and not layer.int8] == ["qkv.query", "qkv.key", "qkv.value"]
    assert attention_of(qmodel).reason == "its input is float"
    x = tokens(2)
    with torch.no_grad():
        assert float(sqnr(model(x), qmodel(x)).mean()) > 35


def test_profiles_pass_through_norm_and_values():
    """Channels of very different size behind a norm's scale and in the values: a profile takes them up, whatever the strategy."""

    class Outliers(Timm):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                spread = torch.logspace(-1.5, 1.5, WIDTH)
                self.norm1.weight *= spread
                self.norm1.bias *= spread
                self.qkv.weight /= spread
                values = torch.logspace(-1, 1, WIDTH)
                self.qkv.weight[2 * WIDTH :] *= values[:, None]
                self.qkv.bias[2 * WIDTH :] *= values
                self.proj.weight /= values

    x = tokens(2)
    results = {}
    for profile in (False, True):
        model, qmodel = quantized(Outliers, channel_profile=profile)
        with torch.no_grad():
            results[profile] = float(sqnr(model(x), qmodel(x)).mean())
    assert results[True] > results[False] + 3, results


def test_capture_telemetry_compile_and_export():
    model, qmodel = quantized(Timm, "probabilistic")
    x = tokens(2)
    output, captured = qmodel.capture(x)
    wanted = pq.capture(model, x, like=qmodel)[1]
    assert captured.keys() == wanted.keys() and len(captured) == 10
    for name, layer in captured.items():
        assert float(sqnr(wanted[name].value, layer.value).mean()) > 30, name
    telemetry = qmodel.telemetry()
    assert torch.equal(telemetry(x), output)
    assert {row["layer"] for row in telemetry.rows()} >= {"norm1", "qkv.query", "fc1"}
    with torch.no_grad():
        assert torch.equal(torch.compile(qmodel, fullgraph=True, backend="eager")(x), output)
        program = torch.export.export(qmodel, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert torch.equal(program.module()(x[:3]), output[:3])
