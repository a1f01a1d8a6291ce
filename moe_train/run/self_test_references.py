"""References of the self-tests, in NumPy and float64: nothing is compiled for them, and no compiler can be wrong in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def grouped_matmul_and_gradients(
    x_RD: np.ndarray, w_EDF: np.ndarray, dy_RF: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, ...]:
    """Multiply the rows of each expert by its matrix, one expert at a time.

    Args:
        x_RD: rows in the order of their experts.
        w_EDF: one matrix per expert.
        dy_RF: gradient of the products.
        sizes: number of rows of each expert; the remaining rows belong to no expert.

    Returns:
        The products (R, F), and the gradients of x (R, D) and of w (E, D, F).
    """
    x, w, dy = (np.asarray(array, np.float64) for array in (x_RD, w_EDF, dy_RF))
    y_RF = np.zeros(dy.shape)
    dx_RD = np.zeros(x.shape)
    dw_EDF = np.zeros(w.shape)
    end = 0
    for e, size in enumerate(sizes):
        rows = slice(end, end + size)
        end += size
        y_RF[rows] = x[rows] @ w[e]
        dx_RD[rows] = dy[rows] @ w[e].T
        dw_EDF[e] = x[rows].T @ dy[rows]
    return y_RF, dx_RD, dw_EDF


def attention_and_gradients(
    q_BTNH: np.ndarray, k_BTKH: np.ndarray, v_BTKW: np.ndarray, dy_BTNW: np.ndarray, visible_BTT: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Compute softmax(q·k / sqrt(H)) v one head at a time, with all scores in memory.

    Args:
        q_BTNH: queries of N heads.
        k_BTKH: keys of K heads; N is a multiple of K.
        v_BTKW: values, which may have another width than keys.
        dy_BTNW: gradient of the output.
        visible_BTT: mask that is true where a query sees a key; each query sees at least one.

    Returns:
        The output (B, T, N, W), and the gradients of q, k and v.
    """
    q, k, v, dy = (np.asarray(array, np.float64) for array in (q_BTNH, k_BTKH, v_BTKW, dy_BTNW))
    B, _, N, H = q.shape
    group = N // k.shape[2]
    y = np.zeros(dy.shape)
    dq, dk, dv = (np.zeros(array.shape) for array in (q, k, v))
    for b, n in np.ndindex(B, N):
        q_TH, dy_TW = q[b, :, n], dy[b, :, n]
        k_TH, v_TW = k[b, :, n // group], v[b, :, n // group]
        scores = np.where(visible_BTT[b], q_TH @ k_TH.T / math.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        y[b, :, n] = weights @ v_TW
        dweights = dy_TW @ v_TW.T
        dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) / math.sqrt(H)
        dq[b, :, n] = dscores @ k_TH
        dk[b, :, n // group] += dscores.T @ q_TH
        dv[b, :, n // group] += weights.T @ dy_TW
    return y, dq, dk, dv
