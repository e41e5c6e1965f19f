"""The operator under the microscope: statistics, certificates, the paper's claims."""
