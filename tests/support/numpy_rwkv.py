"""RWKV-5.2, 6 and 7 in NumPy float64, one token at a time: an oracle that shares no code with the library.

Written from the models' equations; weights are a dict of arrays under RWKV-LM's names.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def head_norm(x, heads, weight, bias):
    x = x.reshape(heads, -1)
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 64e-5)
    return normed.ravel() * weight + bias


class NumpyRWKV:
    def __init__(self, weights):
        self.w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith("blocks."))
        if "blocks.0.att.r_k" in self.w:
            self.att, self.ffn, per_head = self.att7, self.ffn7, "r_k"
        elif "blocks.0.att.time_maa_x" in self.w:
            self.att, self.ffn, per_head = self.att6, self.ffn6, "time_faaaa"
        else:
            self.att, self.ffn, per_head = self.att5, self.ffn5, "time_faaaa"
        self.heads, self.size = self.w[f"blocks.0.att.{per_head}"].shape
        width = self.w["emb.weight"].shape[1]
        self.att_before = np.zeros((self.layers, width))
        self.ffn_before = np.zeros((self.layers, width))
        self.state = np.zeros((self.layers, self.heads, self.size, self.size))

    def logits(self, tokens):
        return np.stack([self.step(token) for token in tokens])

    def step(self, token):
        w = self.w
        x = layer_norm(w["emb.weight"][token], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
        v_first = None
        for layer in range(self.layers):
            p = {n.split(".", 2)[2]: a for n, a in w.items() if n.startswith(f"blocks.{layer}.")}
            h = layer_norm(x, p["ln1.weight"], p["ln1.bias"])
            out, v_first = self.att(p, layer, h, self.att_before[layer], v_first)
            self.att_before[layer] = h
            x = x + out
            h = layer_norm(x, p["ln2.weight"], p["ln2.bias"])
            x = x + self.ffn(p, h, self.ffn_before[layer])
            self.ffn_before[layer] = h
        return w["head.weight"] @ layer_norm(x, w["ln_out.weight"], w["ln_out.bias"])

    def read_key_value(self, layer, r, k, v, decay, u):
        """WKV5 and WKV6: the state is [head, key, value]."""
        y = np.empty((self.heads, self.size))
        for h in range(self.heads):
            new = np.outer(k[h], v[h])
            y[h] = r[h] @ (self.state[layer, h] + u[h][:, None] * new)
            self.state[layer, h] = decay[h][:, None] * self.state[layer, h] + new
        return y.ravel()

    def att5(self, p, layer, x, s, _):
        def mixed(name):
            mix = p[f"att.time_mix_{name}"].ravel()
            return x * mix + s * (1 - mix)

        def by_head(z):
            return z.reshape(self.heads, self.size)

        r = by_head(p["att.receptance.weight"] @ mixed("r"))
        k = by_head(p["att.key.weight"] @ mixed("k"))
        v = by_head(p["att.value.weight"] @ mixed("v"))
        g = p["att.gate.weight"] @ mixed("g")
        y = self.read_key_value(layer, r, k, v, np.exp(-np.exp(p["att.time_decay"])), p["att.time_faaaa"])
        z = head_norm(y, self.heads, p["att.ln_x.weight"], p["att.ln_x.bias"])
        return p["att.output.weight"] @ (z * g * sigmoid(g)), None

    def ffn5(self, p, x, s):
        mix_k, mix_r = p["ffn.time_mix_k"].ravel(), p["ffn.time_mix_r"].ravel()
        k = np.maximum(p["ffn.key.weight"] @ (x * mix_k + s * (1 - mix_k)), 0) ** 2
        r = sigmoid(p["ffn.receptance.weight"] @ (x * mix_r + s * (1 - mix_r)))
        return r * (p["ffn.value.weight"] @ k)

    def att6(self, p, layer, x, s, _):
        d = s - x
        low = np.tanh((x + d * p["att.time_maa_x"].ravel()) @ p["att.time_maa_w1"]).reshape(5, -1)
        mixed = {}
        for j, name in enumerate("wkvrg"):
            mixed[name] = x + d * (p[f"att.time_maa_{name}"].ravel() + low[j] @ p["att.time_maa_w2"][j])

        def by_head(z):
            return z.reshape(self.heads, self.size)

        w = p["att.time_decay"].ravel() + np.tanh(mixed["w"] @ p["att.time_decay_w1"]) @ p["att.time_decay_w2"]
        r = by_head(p["att.receptance.weight"] @ mixed["r"])
        k = by_head(p["att.key.weight"] @ mixed["k"])
        v = by_head(p["att.value.weight"] @ mixed["v"])
        g = p["att.gate.weight"] @ mixed["g"]
        y = self.read_key_value(layer, r, k, v, by_head(np.exp(-np.exp(w))), p["att.time_faaaa"])
        z = head_norm(y, self.heads, p["att.ln_x.weight"], p["att.ln_x.bias"])
        return p["att.output.weight"] @ (z * g * sigmoid(g)), None

    def ffn6(self, p, x, s):
        k = np.maximum(p["ffn.key.weight"] @ (x + (s - x) * p["ffn.time_maa_k"].ravel()), 0) ** 2
        r = sigmoid(p["ffn.receptance.weight"] @ (x + (s - x) * p["ffn.time_maa_r"].ravel()))
        return r * (p["ffn.value.weight"] @ k)

    def att7(self, p, layer, x, s, v_first):
        def mixed(name):
            return x + (s - x) * p[f"att.x_{name}"].ravel()

        def by_head(z):
            return z.reshape(self.heads, self.size)

        def lora(name, hidden):
            return p[f"att.{name}0"].ravel() + hidden @ p[f"att.{name}2"]

        r = by_head(p["att.receptance.weight"] @ mixed("r"))
        k = p["att.key.weight"] @ mixed("k")
        v = p["att.value.weight"] @ mixed("v")
        omega = lora("w", np.tanh(mixed("w") @ p["att.w1"]))
        decay = by_head(np.exp(-np.exp(-np.logaddexp(0, -omega) - 0.5)))
        a = sigmoid(lora("a", mixed("a") @ p["att.a1"]))
        g = sigmoid(mixed("g") @ p["att.g1"]) @ p["att.g2"]
        if layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(lora("v", mixed("v") @ p["att.v1"]))
        q = by_head(k * p["att.k_k"].ravel())
        kappa = q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-12)
        k, v, a = by_head(k * (1 + (a - 1) * p["att.k_a"].ravel())), by_head(v), by_head(a)
        y = np.empty((self.heads, self.size))
        for h in range(self.heads):
            S = self.state[layer, h]  # [value, key]
            S = S * decay[h] - np.outer(S @ kappa[h], kappa[h] * a[h]) + np.outer(v[h], k[h])
            self.state[layer, h] = S
            y[h] = S @ r[h]
        z = head_norm(y.ravel(), self.heads, p["att.ln_x.weight"], p["att.ln_x.bias"])
        bonus = (r * k * p["att.r_k"]).sum(1, keepdims=True) * v
        return p["att.output.weight"] @ ((z + bonus.ravel()) * g), v_first

    def ffn7(self, p, x, s):
        k = p["ffn.key.weight"] @ (x + (s - x) * p["ffn.x_k"].ravel())
        return p["ffn.value.weight"] @ np.maximum(k, 0) ** 2
