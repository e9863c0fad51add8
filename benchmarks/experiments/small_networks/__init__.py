"""The paper's small networks: one training with noise each, which all criteria judge and continuous runs start from."""
