"""Analysis of a trained model: measurements, findings and the page that shows them."""
