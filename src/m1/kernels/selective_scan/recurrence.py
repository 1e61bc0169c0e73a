"""The recurrence of the selective scan in torch, chunked over time, with its own backward; gates are in reference.py.

    h_t = a_t·h_{t-1} + u_t·B_t,   y_t = Σ_n C_t·h_t,   with a_t = exp(Δ_t·A) and u_t = Δ_t·x_t

Time is cut into chunks that never cross a document, and LANES chunks advance together, one position a step. A first pass
with zero entry states gives each chunk's end state S_k; its total decay is exp(A·ΣΔ); so the true entry states follow
from a short recurrence over chunks, E_{k+1} = exp(A·ΣΔ_k)·E_k + S_k. A second pass from these gives the outputs.

The backward keeps only the entry states and recomputes the others. With g_t = ∂L/∂h_t, everything follows from one
recurrence that runs backwards through time with the same decays:

    g_t  = C_t·dy_t + a_{t+1}·g_{t+1}           (at a document's last token the second term is its final state's gradient)
    dC_t = Σ_p dy_t·h_t      dB_t = Σ_p g_t·u_t      du_t = Σ_n g_t·B_t      d(initial state) = a_1·g_1
    dA   = Σ_t m_t·Δ_t       dΔ_t = Σ_n m_t·A + x_t·du_t      dx_t = Δ_t·du_t      where m_t = g_t·a_t·h_{t-1}

It is chunked as the forward is: gradients of the entry states with zero exit gradients, a recurrence over chunks from
the last to the first, then the true gradients. dB and dx sum over the heads that read one group.

Every product writes into a buffer (`out=`), which also keeps autocast away from it: all is fp32.

Extra memory: T/CHUNK states from forward to backward, and LANES·CHUNK states while a block of chunks is differentiated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m1.kernels.chunks import Chunks

CHUNK = 32  # most tokens a chunk
LANES = 16  # chunks a block: enough work an operation, and states that stay in a core's cache (16·H·P·N floats)


class Recurrence(torch.autograd.Function):
    """(x [T, Gx, P], Δ [T, H, P], A [H, P, N], B [T, G, N], C [T, H, N], initial [n, H, P, N] | None, chunks), all fp32,
    to (y [T, H, P], final states [n, H, P, N]).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        scan = _Scan(x, delta, A, B, C, chunks)
        entry = scan.entry_states(initial)
        ctx.save_for_backward(x, delta, A, B, C, entry)
        ctx.chunks, ctx.has_initial = chunks, initial is not None
        return scan.outputs(entry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        x, delta, A, B, C, entry = ctx.saved_tensors
        scan = _Scan(x, delta, A, B, C, ctx.chunks)
        dy = scan.lay_out_output_gradient(dy)
        exit_gradients = scan.exit_gradients(dy, dfinal)
        *gradients, dinitial = scan.differentiate(entry, dy, exit_gradients)
        return *gradients, dinitial if ctx.has_initial else None, None


class _Scan:
    """The inputs laid out by chunk: [Q, …] so that each step of each block is one contiguous view.

    States are [L, H·P, N] for the L chunks of a block, and the same memory seen by group ([L·G, R·P, N], R = H/G, for
    what is shared with B) and by head ([L·H, P, N], for what is shared with C).
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunks: Chunks) -> None:
        self.chunks, self.state_shape = chunks, A.shape
        self.H, self.P, self.N = A.shape
        self.G, self.Gx, Q, K = B.shape[1], x.shape[1], chunks.length, chunks.count
        self.A = A.reshape(-1, self.N)
        self.delta = chunks.cut_zero(delta).view(Q, K, -1, 1)  # Δ = 0 leaves a state as it is
        self.x = chunks.cut(x)[:, :, :, None]  # [Q, K, Gx, 1, P]
        self.u = (self.delta.view(Q, K, self.Gx, -1, self.P) * self.x).view(Q, K * self.G, -1, 1)
        self.B = chunks.cut(B).view(Q, K * self.G, 1, self.N)
        self.C = chunks.cut(C).view(Q, K * self.H, 1, self.N)

    def lay_out_output_gradient(self, dy: Tensor) -> Tensor:
        return self.chunks.cut_zero(dy).view(self.chunks.length, -1, self.P, 1)  # [Q, K·H, P, 1]

    def entry_states(self, initial: Tensor | None) -> Tensor:
        """The state before each chunk, [K, H·P, N]."""
        chunks = self.chunks
        entry = self._new_states()
        if initial is not None:
            entry[chunks.first] = initial.reshape(-1, *self.A.shape)
        if chunks.rounds:
            ends, total = self._new_states(), self._total_decay()
            for low, high in self._blocks():
                h, decay = ends[low:high], torch.empty_like(ends[low:high])
                for delta, u, B in self._steps(low, high, self.delta, self.u, self.B):
                    self._advance(h, h, delta, u, B, decay)
            for here in chunks.rounds:
                entry[here] = torch.addcmul(ends[here - 1], total[here - 1], entry[here - 1])
        return entry

    def outputs(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """y [T, H, P] and the state after each document [n, H, P, N]."""
        y = self.A.new_empty(self.chunks.length, self.chunks.count * self.H, self.P, 1)
        states = entry.clone()
        for low, high in self._blocks():
            h = states[low:high]
            h_by_head, decay = self._by_head(h), torch.empty_like(h)
            for delta, u, B, C, y_q in self._steps(low, high, self.delta, self.u, self.B, self.C.mT, y):
                self._advance(h, h, delta, u, B, decay)
                torch.bmm(h_by_head, C, out=y_q)
        return self._join(y, self.H, self.P), states[self.chunks.last].view(-1, *self.state_shape)

    def exit_gradients(self, dy: Tensor, dfinal: Tensor) -> Tensor:
        """The gradient of the state after each chunk, [K, H·P, N]."""
        chunks = self.chunks
        exits = self._new_states()
        exits[chunks.last] = dfinal.reshape(-1, *self.A.shape)
        if chunks.rounds:
            entries, total = self._new_states(), self._total_decay()
            for low, high in self._blocks():
                g, decay = entries[low:high], torch.empty_like(entries[low:high])
                g_by_head = self._by_head(g)
                for delta, C, dy_q in reversed(self._steps(low, high, self.delta, self.C, dy)):
                    g_by_head.addcmul_(dy_q, C)
                    g.mul_(self._decay(delta, decay))
            for here in reversed(chunks.rounds):
                exits[here - 1] = torch.addcmul(entries[here], total[here], exits[here])
        return exits

    def differentiate(self, entry: Tensor, dy: Tensor, exits: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x, Δ, A, B, C and of the initial states; turns `exits` into the entry states' gradients."""
        Q, K = self.chunks.length, self.chunks.count
        ddelta, du, dB, dC = (torch.empty_like(tensor) for tensor in (self.delta, self.u, self.B, self.C))
        dA = torch.zeros_like(self.A)
        states = self.A.new_empty(Q + 1, min(LANES, K), *self.A.shape)
        for low, high in self._blocks():
            self._differentiate_block(low, high, entry, states[:, : high - low], dy, exits, (ddelta, du, dB, dC, dA))
        du = du.view(Q, K, self.Gx, -1, self.P)
        ddelta.view_as(du).addcmul_(du, self.x)
        return (
            self.chunks.join((du * self.delta.view_as(du)).sum(3)),
            self._join(ddelta, self.H, self.P),
            dA.view(self.state_shape),
            self._join(dB, self.G, self.N),
            self._join(dC, self.H, self.N),
            exits[self.chunks.first].view(-1, *self.state_shape),
        )

    def _differentiate_block(
        self, low: int, high: int, entry: Tensor, states: Tensor, dy: Tensor, exits: Tensor, gradients: tuple[Tensor, ...]
    ) -> None:
        """Write a block's part of (dΔ, du, dB, dC) and add its part of dA; `states` [Q+1, L, H·P, N] is room to work."""
        *written, dA = gradients
        g = exits[low:high]
        states[0] = entry[low:high]
        decay, m, dA_by_lane = torch.empty_like(g), torch.empty_like(g), torch.zeros_like(g)
        steps = self._steps(low, high, self.delta, self.u, self.B, self.C, dy, *written)
        for q, (delta, u, B, *_) in enumerate(steps):
            self._advance(states[q], states[q + 1], delta, u, B, decay)
        g_by_group, g_by_head, m_by_head = self._by_group(g), self._by_head(g), self._by_head(m)
        ones = g.new_ones(self.N, 1)
        for q, (delta, u, B, C, dy_q, ddelta, du, dB, dC) in reversed(list(enumerate(steps))):
            g_by_head.addcmul_(dy_q, C)
            torch.mul(self._by_head(states[q + 1]), dy_q, out=m_by_head)
            torch.sum(m_by_head, 1, keepdim=True, out=dC)
            torch.bmm(g_by_group, B.mT, out=du)
            torch.bmm(u.mT, g_by_group, out=dB)
            g.mul_(self._decay(delta, decay))
            torch.mul(g, states[q], out=m)
            dA_by_lane.addcmul_(m, delta)
            torch.mm(m.mul_(self.A).view(-1, self.N), ones, out=ddelta.view(-1, 1))  # Σ_n, faster than sum
        dA += dA_by_lane.sum(0)

    def _advance(self, before: Tensor, after: Tensor, delta: Tensor, u: Tensor, B: Tensor, decay: Tensor) -> None:
        torch.mul(before, self._decay(delta, decay), out=after)
        self._by_group(after).addcmul_(u, B)

    def _decay(self, delta: Tensor, out: Tensor) -> Tensor:
        return torch.mul(delta, self.A, out=out).exp_()

    def _new_states(self) -> Tensor:
        return self.A.new_zeros(self.chunks.count, *self.A.shape)

    def _total_decay(self) -> Tensor:
        return self.delta.sum(0).mul(self.A).exp_()  # [K, H·P, N]

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for low in range(0, self.chunks.count, LANES):
            yield low, min(low + LANES, self.chunks.count)

    def _steps(self, low: int, high: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """What chunks low … high-1 hold at each of the Q positions, as views."""
        rows = [tensor.shape[1] // self.chunks.count for tensor in tensors]  # 1, G or H rows a chunk
        views = [tensor[:, low * row : high * row].unbind(0) for tensor, row in zip(tensors, rows, strict=True)]
        return list(zip(*views, strict=True))

    def _by_group(self, state: Tensor) -> Tensor:
        return state.view(len(state) * self.G, -1, self.N)

    def _by_head(self, state: Tensor) -> Tensor:
        return state.view(len(state) * self.H, self.P, self.N)

    def _join(self, chunked: Tensor, *sizes: int) -> Tensor:
        return self.chunks.join(chunked.view(self.chunks.length, self.chunks.count, *sizes))
