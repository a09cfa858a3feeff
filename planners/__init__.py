"""From a raw dataset to plans: fingerprint, topology, memory, semi-supervised rules."""
