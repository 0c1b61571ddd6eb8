"""What a number is: elements, scales, formats, the catalogue of them, and their reference arithmetic."""
