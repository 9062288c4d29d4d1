"""The gated delta rule: definition, chunked form, public op. `README.md` holds the derivation."""
