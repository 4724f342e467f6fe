"""The contract of every scheme: gradients, and what is stored and read again."""

# Shapes: N num_embeddings, D embedding_dim.

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from support.scheme_cases import (
    ALL,
    Case,
    D,
    N,
    every_case,
    same,
    same_bits,
    served,
)
from torch import Tensor
from torch.func import functional_call

from embstore import open_store
from embstore.errors import ConfigError
from embstore.quantize import DTYPES

# ---- training ---------------------------------------------------------------------------------------------------


BATCH = torch.tensor([[0, 5, 5], [N - 1, 0, 12]])  # repeated ids and shared buckets: gradients must add up


@every_case
def test_gradients_are_the_numerical_ones(case: Case) -> None:
    """Every stored number's gradient equals the slope of the formula, in float64."""
    if case.variant.straight_through:
        pytest.skip("rounded numbers have no slope: the scheme's own test says what their gradients are")
    module = case.cls.from_tensors(*case.filled(d=3).export()).double().eval()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def vectors(*values: Tensor) -> Tensor:
        found: Tensor = functional_call(module, dict(zip(names, values, strict=True)), (BATCH,))
        return found

    assert torch.autograd.gradcheck(vectors, parameters)


@every_case
def test_all_that_is_stored_is_trained(case: Case) -> None:
    """What is stored as floats are parameters, and a batch of all ids gives each of them a gradient."""
    if case.variant.straight_through:
        pytest.skip("what is trained is not what is stored")
    module = case.cls.from_tensors(*case.filled().export())
    layout = case.cls.layout(module.export()[0])
    stored = {name for name, slot in layout.items() if slot.dtype == "float32"}
    assert stored == {name for name, _ in module.named_parameters()}
    (module(torch.arange(N)) * torch.randn(N, case.dim(D))).sum().backward()
    for parameter in module.parameters():
        assert (parameter.grad != 0).any()
        if case.variant.every_row_is_read and parameter.ndim > 1:
            assert (parameter.grad != 0).any(dim=1).all()


@every_case
def test_sparse_gradients_are_the_dense_ones(case: Case) -> None:
    """`sparse=True` changes how gradients are kept, not what they are."""
    dense, sparse = case.filled(), case.build(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    factor = torch.randn(*BATCH.shape, case.dim(D))
    for module in (dense, sparse):
        (module(BATCH) * factor).sum().backward()
    for name, parameter in dense.named_parameters():
        twin = sparse.get_parameter(name)
        assert not parameter.grad.is_sparse
        found = twin.grad.to_dense() if twin.grad.is_sparse else twin.grad
        torch.testing.assert_close(found, parameter.grad)


@every_case
def test_a_step_of_training_changes_what_is_served(case: Case) -> None:
    """The optimiser moves the very numbers that lookup reads."""
    module = case.cls.from_tensors(*case.filled().export())
    ids = torch.arange(N)
    before = served(module, ids)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(ids).square().sum().backward()
    optimiser.step()
    after = served(module, ids)
    assert (before != after).any(dim=1).all()
    assert same(after, module.eval()(ids), case.variant.rtol)


# ---- stored and read again --------------------------------------------------------------------------------------


@every_case
def test_config_and_tensors_are_the_whole_module(case: Case) -> None:
    """A module from the config and the tensors gives the same vectors; so does a deep copy, and a state round trip."""
    module = case.filled()
    config, tensors = module.export()
    parameters = json.loads(json.dumps(config.parameters()))
    again = case.cls.Config(num_embeddings=N, embedding_dim=case.dim(D), **parameters)
    assert again == config
    assert set(parameters) == {f.name for f in fields(config)} - {"num_embeddings", "embedding_dim"}
    ids = torch.arange(N)
    assert same(case.cls.from_tensors(again, tensors).eval()(ids), module(ids), case.variant.rtol)
    assert same_bits(copy.deepcopy(module)(ids), module(ids))
    twin = case.build()
    twin.load_state_dict(module.state_dict())
    assert same_bits(twin(ids), module(ids))


@every_case
def test_a_module_prints_its_sizes(case: Case) -> None:
    """print(module) shows the config and the bytes."""
    module = case.build()
    text = repr(module)
    assert all(f"{name}={value!r}" in text for name, value in asdict(module.config).items())
    assert f"num_bytes={module.num_bytes():,}" in text


READER = """
import sys
import numpy as np
from embstore import open_store
store = open_store(sys.argv[1])
vectors = {}
for name in store.tables():
    table = store.load(name)
    assert all(not tensor.flags.writeable for tensor in table.tensors.values())
    vectors[name] = table.lookup(np.arange(table.ids.num_ids))
np.savez(sys.argv[2], **vectors)
"""


@pytest.mark.timeout(900)  # with nothing compiled yet, that process compiles every loop for every dtype
def test_another_process_reads_the_same_vectors(tmp_path: Path) -> None:
    """Published in every dtype, mapped from disk elsewhere, looked up: what the compiled lookup gave here."""
    store, expected, rtol = open_store(tmp_path / "store"), {}, {}
    for label, case in ALL:
        module = case.filled(d=16)
        for dtype in DTYPES:
            try:
                expected[f"{label}-{dtype}"] = served(module, torch.arange(N), dtype)
            except ConfigError:
                continue
            rtol[f"{label}-{dtype}"] = case.variant.rtol
            store.publish(f"{label}-{dtype}", module, dtype=dtype)
    out = tmp_path / "vectors.npz"
    ran = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "store"), str(out)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = np.load(out)
    assert set(found) == set(expected)
    for name, vectors in expected.items():
        assert same(torch.from_numpy(found[name]), vectors, rtol[name]), name
