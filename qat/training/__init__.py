"""How a gradient passes: the differentiable operators, the engines' activation arithmetic, and the losses."""
