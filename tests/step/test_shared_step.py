"""What a process makes of its gradients when others share the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spt_kernels.distributed import Processes
from spt_kernels.step.shared_step import SharedStep


class TwoAlike(Processes):
    """A process beside which another one has computed the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Twice of everything."""
        self.__dict__["lent"] = [tensor.data_ptr() for tensor in tensors]
        for tensor in tensors:
            tensor.view(-1).mul_(2)


def test_gradients_are_summed_where_they_lie() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 2))
    net[0].to(memory_format=torch.channels_last)
    idle = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*net.parameters(), idle], lr=0.0)
    processes = TwoAlike(None, 0, 2)
    step = SharedStep(net, nn.functional.cross_entropy, optimizer, processes=processes)
    step.backward(torch.randn(3, 3, 3, 3), torch.tensor([0, 1, 0]))
    grads = [parameter.grad for parameter in net.parameters()]
    assert not grads[0].is_contiguous()
    there, expected = [g.data_ptr() for g in grads], [g.clone() for g in grads]
    step.update()
    for parameter, truth in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, truth)
    assert set(there[1:]) < set(processes.__dict__["lent"]), "no copies but of what has to be"
    assert idle.grad is None
