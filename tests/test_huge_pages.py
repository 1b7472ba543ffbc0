"""huge_pages.py: packed weights side by side."""

import torch

import probquant as pq
from probquant.huge_pages import side_by_side


def test_copies_lie_together_each_with_a_storage_of_its_own():
    tensors = [torch.randint(256, (count,), dtype=torch.uint8) for count in (3 << 20, 1, 64, 65, 1 << 20)]
    copies = side_by_side(tensors)
    addresses = [copy.data_ptr() for copy in copies]
    assert addresses[0] % (2 << 20) == 0 and all(address % 64 == 0 for address in addresses)
    assert [b - a for a, b in zip(addresses, addresses[1:], strict=False)] == [3 << 20, 64, 64, 128]
    assert all(torch.equal(copy, tensor) and copy.untyped_storage().nbytes() == tensor.numel() for copy, tensor in zip(copies, tensors, strict=True))
    last = copies.pop()
    del copies
    assert torch.equal(last, tensors[-1])  # keeps the mapping alive


def test_little_stays_where_it_is():
    tensors = [torch.zeros(1000, dtype=torch.uint8)]
    assert side_by_side(tensors)[0] is tensors[0] and side_by_side([]) == []


def test_a_large_model_has_its_weights_there():
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1100), torch.nn.ReLU(), torch.nn.Linear(1100, 1200), torch.nn.ReLU(), torch.nn.Linear(1200, 5)).eval()
    x = torch.randn(4, 1024)
    qmodel = pq.quantize(model, [x], surrogate="gaussian", weight_rounding="nearest", progress=False)
    weights = [tensor for name, tensor in qmodel.named_buffers() if name.endswith("packed_weight")]
    assert weights[0].data_ptr() % (2 << 20) == 0
    assert all(b.data_ptr() == a.data_ptr() + a.numel() for a, b in zip(weights, weights[1:], strict=False))
    before, wanted = [weight.data_ptr() for weight in weights], qmodel(x)
    state = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    for tensor in qmodel.state_dict().values():
        tensor.zero_()
    qmodel.load_state_dict(state)
    assert [tensor.data_ptr() for name, tensor in qmodel.named_buffers() if name.endswith("packed_weight")] == before
    assert torch.equal(qmodel(x), wanted)
