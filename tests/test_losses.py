import torch

from corrzoo.losses import endpoint_errors, mean_where


def test_endpoint_error_is_the_mean_distance_over_the_mask():
    flow, target = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    target[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    target[1, :, 0, 1] = torch.tensor([100.0, 0.0])
    mask = torch.tensor([[[True, True]], [[True, False]]])
    torch.testing.assert_close(mean_where(*endpoint_errors(flow, target, mask)), torch.tensor(5 / 3))


def test_the_loss_without_supervised_cells_is_zero_with_zero_gradient():
    flow = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = mean_where(*endpoint_errors(flow, torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0 and flow.grad.abs().sum() == 0


def test_a_masked_cell_without_error_gives_no_nan():
    flow = torch.zeros(1, 2, 1, 2, requires_grad=True)
    target = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]])
    mean_where(*endpoint_errors(flow, target, torch.tensor([[[False, True]]]))).backward()
    assert torch.isfinite(flow.grad).all()
