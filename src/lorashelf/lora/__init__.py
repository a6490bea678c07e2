"""What an adapter is, and the algebra of ΔW = s B A: no disk, no model, no merge."""
